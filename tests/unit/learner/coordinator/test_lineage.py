"""What a trainer, or a coordinator, that starts again finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.coordinator.decisions import Batch
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
