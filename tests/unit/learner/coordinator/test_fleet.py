"""Sessions are bounded in number, and in how fast they come."""

from __future__ import annotations

import pytest

from learner.config import FleetConfig
from learner.coordinator.fleet import JOINS_PER_SECOND
from penstock.errors import FleetFull

from .fakes import join, make_scheduler


def test_no_more_actors_are_connected_than_the_fleet_may_have():
    scheduler = make_scheduler(fleet=FleetConfig(max_actors=2))
    first = join(scheduler, "a")
    join(scheduler, "b")
    with pytest.raises(FleetFull, match="2 actors are connected"):
        join(scheduler, "c", now=1.0)
    assert join(scheduler, "a", now=1.0) != first, "its newer session takes the older one's place"
    scheduler.tick(1.0)
    scheduler.leave(join(scheduler, "b", now=1.0), "gone", 1.0)
    join(scheduler, "c", now=2.0)


def test_a_rush_of_joins_is_slowed_down_and_writes_nothing():
    scheduler = make_scheduler(fleet=FleetConfig(max_actors=3))
    for _ in range(3):
        join(scheduler, "same")
    scheduler.take_records()
    for _ in range(1000):
        with pytest.raises(FleetFull, match="wait for a turn"):
            join(scheduler, "same")
    assert not scheduler.take_records()
    join(scheduler, "same", now=1.5 / JOINS_PER_SECOND)
