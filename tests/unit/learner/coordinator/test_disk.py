"""Leases stop before the disk is full, and go on when there is room again."""

from __future__ import annotations

from pathlib import Path

from learner.coordinator.core import Coordinator
from learner.coordinator.disk import DiskGuard, Room
from learner.coordinator.ledger import Ledger
from penstock.signals import Stop

from .fakes import Submitter, acquire, join, make_message, make_scheduler, start


def test_leases_stop_below_the_minimum_and_resume_some_way_above_it():
    guard = DiskGuard(1000)
    readings = [5000, 1900, 999, 1100, 1249, 1250, 5000]
    assert [(guard.note(free), guard.room)[1] for free in readings] == [
        Room.ENOUGH, Room.LOW, Room.NONE, Room.NONE, Room.NONE, Room.LOW, Room.ENOUGH,
    ]  # fmt: skip


def test_each_change_is_an_event_and_nothing_else_is():
    guard = DiskGuard(2**20)
    events = [guard.note(free) for free in (10 * 2**20, 2**19, 2**19, 4 * 2**20)]
    assert [event is None for event in events] == [True, False, True, False]
    assert "0 MiB free; ledger.min_free_bytes is 1 MiB: leases stop" in str(events[1])


def test_a_full_disk_stops_leases_and_takes_what_is_leased(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    scheduler = make_scheduler(history=ledger)
    coordinator = Coordinator(scheduler, ledger, Stop(), run_id="r", min_free_bytes=1000)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    (lease,) = acquire(scheduler, submit.session_id, version, 1)
    coordinator.note_disk(10)
    assert not acquire(scheduler, submit.session_id, version, 1)
    assert any("no leases are granted until there is room" in line for line in coordinator.why())
    assert submit(make_message(lease, version)).state == "pending"
    coordinator.note_disk(10_000)
    assert len(acquire(scheduler, submit.session_id, version, 1)) == 1
    ledger.close()
