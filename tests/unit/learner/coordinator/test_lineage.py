"""What a trainer, or a coordinator, that starts again finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.config import FleetConfig
from learner.coordinator.decisions import Batch
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.ledger import Ledger
from learner.coordinator.scheduler import Scheduler
from penstock.errors import ProtocolError
from penstock.trajectory import PolicyVersion

from .fakes import Submitter, acquire, digest_of, join, make_message, make_scheduler, publish, restore, start


def play(scheduler: Scheduler, version: PolicyVersion, num: int, *, actor: str = "a") -> list[str]:
    """An actor acquires up to `num` leases and fills them. Returns the leases."""
    session = join(scheduler, actor)
    submit = Submitter(scheduler, session)
    leases = acquire(scheduler, session, version, num)
    for lease in leases:
        submit(make_message(lease, version))
    return [lease.lease_id for lease in leases]


def step(scheduler: Scheduler) -> tuple[int, ...]:
    """Trains one step; the groups that it took."""
    version = scheduler.version
    assert version is not None
    batch = scheduler.lineage.next_batch(version.epoch, version.step)
    assert isinstance(batch, Batch), batch
    publish(scheduler, PolicyVersion(version.epoch, version.step + 1))
    return batch.group_ids


def test_a_version_made_from_other_groups_than_were_handed_out_is_refused():
    scheduler = make_scheduler()
    version = start(scheduler)
    play(scheduler, version, 4)
    scheduler.lineage.next_batch(version.epoch, 0)
    after = PolicyVersion(version.epoch, 1)
    with pytest.raises(ProtocolError, match=r"trained on groups \[7\]; step 0 was given \[0, 1\]"):
        scheduler.lineage.published(after, digest_of(after), b"", "{}", (7,))
    assert scheduler.lineage.published(after, digest_of(after), b"", "{}", (0, 1)), (
        "the refusal changed nothing"
    )


def test_a_lineage_begins_with_the_version_of_its_checkpoint():
    scheduler = make_scheduler()
    epoch = scheduler.lineage.open(3, [])
    with pytest.raises(ProtocolError, match="expected"):
        publish(scheduler, PolicyVersion(epoch, 4))


def test_a_coordinator_started_again_hands_out_the_same_batch(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    scheduler = make_scheduler(history=ledger, max_lag=2)
    version = start(scheduler)
    play(scheduler, version, 4)
    before = scheduler.lineage.next_batch(version.epoch, 0)
    assert isinstance(before, Batch)
    play(scheduler, version, 4, actor="b")
    ledger.write_blocking(scheduler.take_records())
    ledger.close()

    ledger = Ledger(tmp_path / "ledger.sqlite")
    again = make_scheduler(history=ledger, max_lag=2)
    found = ledger.recover()
    restore(again, found)
    assert found.newest is not None
    again.lineage.resume(found.newest.version)
    after = again.lineage.next_batch(version.epoch, 0)
    assert isinstance(after, Batch)
    assert after.group_ids == before.group_ids
    assert [m.trajectory_id for g in after.groups for m in g.members] == [
        m.trajectory_id for g in before.groups for m in g.members
    ]
    ledger.close()


def test_a_paused_run_stays_paused_until_an_operator_resumes_it(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    scheduler = make_scheduler(history=ledger)
    for paused in (True, False):
        scheduler.set_paused(paused)
        ledger.write_blocking(scheduler.take_records())
        scheduler = make_scheduler(history=ledger)
        restore(scheduler, ledger.recover())
        version = start(scheduler)
        assert bool(acquire(scheduler, join(scheduler), version, 1)) is not paused
        ledger.write_blocking(scheduler.take_records())
    ledger.close()


def break_a_slot(submit: Submitter, version: PolicyVersion) -> None:
    """Spends the budget of the first free one."""
    for _ in range(FleetConfig().data_budget):
        (broken,) = acquire(submit.scheduler, submit.session_id, version, 1)
        submit.release(broken, LeaseOutcome.DATA)


def missing(scheduler: Scheduler) -> dict[int, int]:
    return {group_id: group.num_missing for group_id, group in scheduler.groups.items()}


def test_a_slot_that_was_given_up_stays_so_when_the_coordinator_or_the_trainer_starts_again(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    options = {"groups_per_step": 1, "group_size": 3, "max_lag": 2}
    scheduler = make_scheduler(history=ledger, **options)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    break_a_slot(submit, version)
    for lease in acquire(scheduler, submit.session_id, version, 4):
        submit(make_message(lease, version))
    # Of the second group two slots are filled, and the third is given up as too late.
    scheduler.board.train_without_missing(scheduler.groups[1], "late")
    assert missing(scheduler) == {0: 0, 1: 0}
    assert step(scheduler) == (0,)
    ledger.write_blocking(scheduler.take_records())

    scheduler.lineage.open(0, ledger.groups_trained_from(0))
    assert missing(scheduler) == {0: 0, 1: 0}
    publish(scheduler, PolicyVersion(2, 0))
    assert [step(scheduler), step(scheduler)] == [(0,), (1,)]
    assert not scheduler.groups
    ledger.write_blocking(scheduler.take_records())
    # Also in a process that never saw why they lack a trajectory.
    again = make_scheduler(history=ledger, **options)
    restore(again, ledger.recover())
    again.lineage.open(0, ledger.groups_trained_from(0))
    assert missing(again) == {0: 0, 1: 0}
    ledger.close()


def test_a_restored_group_goes_by_the_faults_of_its_slots_unless_the_trainer_has_it(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    options = {"groups_per_step": 1, "group_size": 3, "max_lag": 2}
    scheduler = make_scheduler(history=ledger, **options)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    for lease in acquire(scheduler, submit.session_id, version, 2):
        submit(make_message(lease, version))
    scheduler.board.train_without_missing(scheduler.groups[0], "late")
    scheduler.lineage.next_batch(version.epoch, 0)
    break_a_slot(submit, version)
    for lease in acquire(scheduler, submit.session_id, version, 2):
        submit(make_message(lease, version))
    submit.release(acquire(scheduler, submit.session_id, version, 1)[0], LeaseOutcome.DATA)
    ledger.write_blocking(scheduler.take_records())
    assert missing(scheduler) == {0: 0, 1: 0, 2: 3}

    again = make_scheduler(history=ledger, **options)
    restore(again, ledger.recover())
    assert missing(again) == {0: 0, 1: 0, 2: 3}
    # With smaller budgets nothing of a group may be left to wait for.
    strict = make_scheduler(history=ledger, fleet=FleetConfig(data_budget=1), **(options | {"group_size": 2}))
    found = ledger.recover()
    del found.open_groups[2].slots[2], found.open_groups[2].slots[1]
    restore(strict, found)
    assert missing(strict) == {0: 0, 1: 0}
    ledger.close()


def test_groups_of_a_void_lineage_are_born_again_at_its_checkpoint():
    """Else their free slots would wait for a version that only they can bring about."""
    scheduler = make_scheduler(max_lag=1)
    version = start(scheduler)
    play(scheduler, version, 8)
    step(scheduler)
    step(scheduler)
    late = PolicyVersion(version.epoch, 2)
    session = join(scheduler, "late")
    assert len(acquire(scheduler, session, late, 8)) == 8
    scheduler.leave(session, "gone", 0.0)

    restored = start(scheduler, step=1)
    filled = play(scheduler, restored, 8, actor="new")
    assert {int(lease.split(".")[0]) for lease in filled} == {4, 5, 6, 7}
    assert [step(scheduler), step(scheduler)] == [(4, 5), (6, 7)]


def test_void_groups_are_due_in_turn_and_none_is_dropped_for_age():
    scheduler = make_scheduler(max_lag=1)
    version = start(scheduler)
    trained = []
    for number in range(6):
        play(scheduler, PolicyVersion(version.epoch, number), 100, actor=f"a{number}")
        trained.append(scheduler.lineage.next_batch(version.epoch, number))
        step(scheduler)
    void = [group for batch in trained[1:] for group in batch.groups]  # type: ignore[union-attr]

    epoch = scheduler.lineage.open(1, void)
    publish(scheduler, PolicyVersion(epoch, 1))
    assert [step(scheduler) for _ in range(5)] == [batch.group_ids for batch in trained[1:]]  # type: ignore[union-attr]
    assert not [record for record in scheduler.take_records() if "Dropped" in type(record).__name__]
