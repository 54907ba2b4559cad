"""Who gets which lease while there is less than actors ask for."""

from __future__ import annotations

from learner.coordinator.decisions import Batch
from learner.coordinator.scheduler import Scheduler
from penstock.trajectory import Lease, PolicyVersion

from .fakes import Submitter, acquire, join, make_message, make_scheduler, publish, start

NUM_SLOTS = 8


class Actors:
    """Each asks for as many leases as it has free places, in the order in which they came, at each wake."""

    def __init__(self, scheduler: Scheduler, version: PolicyVersion, names: str) -> None:
        self.scheduler = scheduler
        self.version = version
        self.submitters = {name: Submitter(scheduler, join(scheduler, name)) for name in names}

    def round(self) -> dict[str, int]:
        """All are told that there may be room, and who gets less than it asked for asks for the rest.

        What they get is played at once, and a step is trained.
        """
        granted: dict[str, list[Lease]] = {name: [] for name in self.submitters}
        for _ in range(2):
            for name, submit in self.submitters.items():
                free = NUM_SLOTS - len(granted[name])
                granted[name] += (
                    acquire(self.scheduler, submit.session_id, self.version, free) if free else []
                )
        for name, leases in granted.items():
            for lease in leases:
                self.submitters[name](make_message(lease, self.version))
        batch = self.scheduler.lineage.next_batch(self.version.epoch, self.version.step)
        assert isinstance(batch, Batch)
        self.version = publish(self.scheduler, PolicyVersion(self.version.epoch, self.version.step + 1))
        return {name: len(leases) for name, leases in granted.items()}


def test_an_actor_that_comes_later_gets_its_part_of_the_next_room():
    scheduler = make_scheduler(groups_per_step=4, group_size=2, max_lag=0)
    actors = Actors(scheduler, start(scheduler), "abcd")
    assert actors.round() == {"a": 8, "b": 0, "c": 0, "d": 0}, "nobody else had asked"
    for _ in range(3):
        granted = actors.round()
        assert sum(granted.values()) == 8, "no room is left over"
        assert set(granted.values()) <= {1, 2, 3}


def test_who_does_not_wait_any_more_has_no_part():
    scheduler = make_scheduler(groups_per_step=2, group_size=4, max_lag=0)
    version = start(scheduler)
    first, second, third = (join(scheduler, name) for name in "abc")
    acquire(scheduler, first, version, 8)
    for session_id in (second, third):
        assert not acquire(scheduler, session_id, version, 8)
    scheduler.asks_no_more(second)
    scheduler.leave(first, "", 0.0)
    assert len(acquire(scheduler, third, version, 8)) == 8
