"""What a leaving actor hands over: kept if it is sound, granted once, to who can go on from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from learner.config import FleetConfig
from learner.coordinator.fleet import ReportedStats
from learner.coordinator.grants import continuation
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.ledger import Ledger
from learner.coordinator.partials import MAX_BYTES_A_GRANT, SentPartial
from learner.coordinator.records import ItemsRefused
from learner.coordinator.scheduler import Scheduler
from learner.coordinator.validation import RejectionCode
from penstock.trajectory import Lease, PolicyVersion, VersionSpan

from .fakes import (
    Submitter,
    acquire,
    join,
    make_message,
    make_partial,
    make_scheduler,
    publish,
    restore,
    start,
)


def hand_over(
    scheduler: Scheduler, partial: SentPartial | None = None, **changes: object
) -> tuple[Lease, PolicyVersion]:
    """An actor acquires a lease and leaves with some of it played."""
    version = scheduler.version
    assert version is not None
    leaving = Submitter(scheduler, join(scheduler, "leaving"))
    lease = acquire(scheduler, leaving.session_id, version, num=1)[0]
    leaving.release(lease, LeaseOutcome.DRAINED, partial=partial or make_partial(lease, version, **changes))
    scheduler.leave(leaving.session_id, "SIGTERM", 0.0)
    return lease, version


def test_the_next_lease_of_the_slot_goes_on_from_it_and_only_once():
    scheduler = make_scheduler()
    start(scheduler)
    lease, version = hand_over(scheduler)
    successor = Submitter(scheduler, join(scheduler, "successor"))
    again, other = acquire(scheduler, successor.session_id, version, num=2)
    assert (again.slot, again.continues) == (lease.slot, True)
    assert not other.continues
    assert scheduler.grants.num_continued == 1
    successor.release(again, LeaseOutcome.INFRASTRUCTURE)
    assert not acquire(scheduler, successor.session_id, version, num=1)[0].continues, (
        "it may have been the cause of the fault"
    )


def test_it_is_on_disk_until_its_group_is_closed(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    scheduler = make_scheduler(history=ledger, groups_per_step=1)
    start(scheduler)
    lease, version = hand_over(scheduler)
    ledger.write_blocking(scheduler.take_records())
    ledger.close()

    ledger = Ledger(tmp_path / "ledger.sqlite")
    scheduler = make_scheduler(history=ledger, groups_per_step=1)
    found = ledger.recover()
    restore(scheduler, found)
    scheduler.lineage.resume(version)
    successor = Submitter(scheduler, join(scheduler, "successor"))
    leases = acquire(scheduler, successor.session_id, version, num=2)
    assert [one.continues for one in leases] == [True, False], "also after the coordinator started again"
    assert ledger.partial(lease.group_id, lease.slot) is not None
    for one in leases:
        successor(make_message(one, version))
    scheduler.lineage.next_batch(version.epoch, 0)
    publish(scheduler, PolicyVersion(version.epoch, 1))
    ledger.write_blocking(scheduler.take_records())
    assert ledger.partial(lease.group_id, lease.slot) is None
    ledger.close()


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        (RejectionCode.BAD_MASK, {"loss_mask": np.zeros(4, dtype=np.uint8)}),
        (RejectionCode.TOKEN_OUT_OF_RANGE, {"token_ids": np.array([1, 2, 3, 99], dtype=np.int32)}),
        (RejectionCode.NON_FINITE_LOGPROB, {"logprobs": np.array([0, 0, np.nan, 0], dtype=np.float32)}),
        (RejectionCode.BAD_LENGTHS, {"logprobs": np.zeros(3, dtype=np.float32)}),
        (RejectionCode.BAD_VERSIONS, {"versions": (VersionSpan(PolicyVersion(1, 0), 1),)}),
        (RejectionCode.UNKNOWN_VERSION, {"versions": (VersionSpan(PolicyVersion(9, 0), 2),)}),
        (
            RejectionCode.TOO_LONG,
            {
                "token_ids": np.ones(65, dtype=np.int32),
                "loss_mask": np.array([0] + [1] * 64, dtype=np.uint8),
                "logprobs": np.zeros(65, dtype=np.float32),
                "versions": (VersionSpan(PolicyVersion(1, 0), 64),),
            },
        ),
    ],
)
def test_what_is_unsound_is_counted_and_the_lease_is_returned_all_the_same(
    code: RejectionCode, changes: dict[str, object]
):
    scheduler = make_scheduler()
    start(scheduler)
    lease, version = hand_over(scheduler, **changes)
    refused = [record for record in scheduler.take_records() if isinstance(record, ItemsRefused)]
    assert [record.rejected for record in refused] == [(code,)]
    again = acquire(scheduler, join(scheduler, "successor"), version, num=1)[0]
    assert (again.slot, again.continues) == (lease.slot, False)


@pytest.mark.parametrize("garbage", [b"\xff\xff", b""])
def test_garbage_is_refused(garbage: bytes):
    scheduler = make_scheduler()
    start(scheduler)
    hand_over(scheduler, SentPartial(garbage, 1))
    refused = [record for record in scheduler.take_records() if isinstance(record, ItemsRefused)]
    assert [record.rejected for record in refused] == [(RejectionCode.CORRUPT,)]


def test_an_actor_with_an_older_version_than_its_tokens_begins_anew():
    """Else the versions of the trajectory would run backwards, and it would be rejected."""
    scheduler = make_scheduler(groups_per_step=1, max_lag=4)
    old = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    leases = acquire(scheduler, submit.session_id, old, num=4)
    for lease in leases[:2]:
        submit(make_message(lease, old))
    scheduler.lineage.next_batch(old.epoch, 0)
    new = publish(scheduler, PolicyVersion(old.epoch, 1))
    mixed = make_partial(leases[2], old, versions=(VersionSpan(old, 1), VersionSpan(new, 1)))
    submit.release(leases[2], LeaseOutcome.DRAINED, partial=mixed)
    assert not acquire(scheduler, join(scheduler, "b"), old, num=1)[0].continues
    assert scheduler.groups[1].slots[0].handed_over is not None


def test_one_answer_brings_only_so_many_bytes(monkeypatch: pytest.MonkeyPatch):
    scheduler = make_scheduler(groups_per_step=8)
    version = start(scheduler)
    leaving = Submitter(scheduler, join(scheduler, "leaving"))
    for lease in acquire(scheduler, leaving.session_id, version, num=8):
        leaving.release(lease, LeaseOutcome.DRAINED, partial=make_partial(lease, version))
    size = len(make_partial(lease, version).payload)
    assert size < MAX_BYTES_A_GRANT
    monkeypatch.setattr("learner.coordinator.grants.MAX_BYTES_A_GRANT", 3 * size + 1)
    assert len(acquire(scheduler, join(scheduler, "successor"), version, num=8)) == 3


def test_a_rival_begins_anew():
    scheduler = make_scheduler(fleet=FleetConfig())
    start(scheduler)
    lease, version = hand_over(scheduler)
    slot = scheduler.groups[lease.group_id].slots[lease.slot]
    slot.lease_ids.append("another")
    assert continuation(slot, version) is None


def test_who_finds_no_room_to_go_on_gives_it_back_whole():
    scheduler = make_scheduler()
    start(scheduler)
    _, version = hand_over(scheduler)
    crowded = Submitter(scheduler, join(scheduler, "crowded"))
    given = acquire(scheduler, crowded.session_id, version, num=1)[0]
    crowded.release(given, LeaseOutcome.DRAINED, "the environment is full")
    again = acquire(scheduler, join(scheduler, "roomy"), version, num=1)[0]
    assert (given.continues, again.slot, again.continues) == (True, given.slot, True)


def test_a_lease_that_was_lost_on_its_way_leaves_what_it_would_have_gone_on_from():
    scheduler = make_scheduler()
    start(scheduler)
    _, version = hand_over(scheduler)
    successor = join(scheduler, "successor")
    lost = acquire(scheduler, successor, version, num=1)[0]
    scheduler.heartbeat(successor, installed=version, stats=ReportedStats(), progress=[], now=30.0)
    again = acquire(scheduler, successor, version, num=1, now=30.0)[0]
    assert (lost.continues, again.slot, again.continues) == (True, lost.slot, True)
