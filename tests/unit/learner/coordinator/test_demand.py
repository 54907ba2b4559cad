"""As many actors as keep the learner busy, and no more than can hold leases."""

from __future__ import annotations

from learner.config import ScheduleConfig
from learner.coordinator.demand import Demand


def make(*, max_lag: int = 4, depth: int = 0) -> Demand:
    """Leases of 8 s; steps of 64 trajectories."""
    schedule = ScheduleConfig(
        num_steps=100, groups_per_step=8, group_size=8, max_lag=max_lag, pipeline_depth=depth
    )
    demand = Demand(schedule)
    for _ in range(100):
        demand.lease_ended(8.0, filled=True)
    return demand


def test_until_there_are_rates_those_that_are_there_are_wanted_and_at_least_one():
    demand = Demand(ScheduleConfig())
    assert demand.wanted([], finished=False) == 1
    assert demand.wanted([32, 32], finished=False) == 2


def test_the_knee_is_where_the_actors_rate_reaches_the_learners():
    demand = make()
    demand.step_trained(4.0, 64)
    assert demand.wanted([16, 16], finished=False) == 8, "an actor makes 2 a second, the learner trains 16"
    assert demand.wanted([], finished=False) == 8, "also while none is there"


def test_slots_that_came_to_nothing_ask_for_more_actors():
    demand = make()
    demand.step_trained(4.0, 64)
    for _ in range(100):
        demand.lease_ended(8.0, filled=False)
    assert demand.wanted([16], finished=False) == 16


def test_no_more_than_can_hold_leases():
    demand = make(depth=1)
    demand.step_trained(0.1, 64)
    assert demand.wanted([16], finished=False) == 4, "64 slots of a step's groups, 16 an actor"


def test_in_the_synchronous_mode_every_slot_helps():
    demand = make(max_lag=0)
    demand.step_trained(1000.0, 64)
    assert demand.wanted([16], finished=False) == 4


def test_a_slow_learner_wants_one_and_a_finished_one_none():
    demand = make()
    demand.step_trained(1000.0, 64)
    assert demand.wanted([16] * 9, finished=False) == 1
    assert demand.wanted([16] * 9, finished=True) == 0
