"""Dynamic sampling in the scheduler: what is dropped, what takes its place, and where it ends."""

from learner.coordinator.decisions import Batch, Waiting
from learner.coordinator.records import GroupDropped, TrajectoryState
from learner.coordinator.sieve import Sieve
from penstock.trajectory import PolicyVersion, Reward
from tests.unit.learner.coordinator.fakes import (
    Submitter,
    acquire,
    join,
    make_message,
    make_scheduler,
    publish,
    start,
)


class Run:
    """One actor that fills groups of two as it is told."""

    def __init__(self, *, max_dropped: int, **schedule: int) -> None:
        self.scheduler = make_scheduler(sieve=Sieve(max_dropped=max_dropped), **schedule)
        self.version = start(self.scheduler)
        self.actor = join(self.scheduler)
        self.submit = Submitter(self.scheduler, self.actor)

    def fill(self, *rewards: tuple[float, float]) -> list[int]:
        """Leases, and submits, a group for each pair. Returns their ids."""
        ids = []
        for pair in rewards:
            leases = acquire(self.scheduler, self.actor, self.version, 2)
            for lease, reward in zip(leases, pair, strict=True):
                self.submit(make_message(lease, self.version, reward=Reward.valid(reward)))
            ids.append(leases[0].group_id)
        return ids

    def batch(self) -> Batch | Waiting:
        return self.scheduler.lineage.next_batch(self.version.epoch, self.version.step)


def test_a_group_with_equal_rewards_is_dropped_and_another_is_admitted() -> None:
    run = Run(max_dropped=10, groups_per_step=1, max_lag=0)
    (dull,) = run.fill((1.0, 1.0))
    assert isinstance(run.batch(), Waiting)
    dropped = [record for record in run.scheduler.take_records() if isinstance(record, GroupDropped)]
    assert [(record.group_id, record.state) for record in dropped] == [(dull, TrajectoryState.GROUP_DROPPED)]
    (good,) = run.fill((1.0, 0.0))
    batch = run.batch()
    assert isinstance(batch, Batch)
    assert batch.group_ids == (good,)


def test_a_step_on_hopeless_tasks_is_trained_after_so_many_refills() -> None:
    run = Run(max_dropped=2, groups_per_step=1, max_lag=0)
    *_, kept = run.fill((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    batch = run.batch()
    assert isinstance(batch, Batch)
    assert batch.group_ids == (kept,)


def test_every_step_may_drop_as_many_again() -> None:
    run = Run(max_dropped=1, groups_per_step=1, max_lag=0)
    for step in range(3):
        (_, kept) = run.fill((0.0, 0.0), (0.0, 0.0))
        batch = run.batch()
        assert isinstance(batch, Batch)
        assert batch.group_ids == (kept,)
        run.version = publish(run.scheduler, PolicyVersion(run.version.epoch, step + 1))


def test_refills_ahead_of_training_stay_within_the_lag_bound() -> None:
    run = Run(max_dropped=100, groups_per_step=2, max_lag=1)
    for _ in range(5):
        run.fill((0.0, 0.0), (1.0, 0.0))
        if len(run.scheduler.groups) == 4:
            break
    assert len(run.scheduler.groups) == 4
    assert acquire(run.scheduler, run.actor, run.version, 1) == []
