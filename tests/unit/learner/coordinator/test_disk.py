"""Leases stop before the disk is full, and go on when there is room again; on a full one the run ends."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from learner.config import DiskConfig
from learner.coordinator.ballast import Ballast
from learner.coordinator.core import NO_LIMITS, Coordinator
from learner.coordinator.disk import DiskGuard, Reading, Room
from learner.coordinator.ledger import Ledger
from learner.coordinator.records import ItemsRefused
from penstock.errors import ConfigError, LedgerError
from penstock.processes import allow_most_files
from penstock.signals import Stop

from .fakes import Submitter, acquire, join, make_message, make_scheduler, start

MIB = 2**20


def used(percent: float, *, of: int = 1000 * MIB) -> Reading:
    return Reading(total_bytes=of, free_bytes=round(of * (100 - percent) / 100))


def states(guard: DiskGuard, *readings: Reading) -> list[Room]:
    return [(guard.note(reading), guard.room)[1] for reading in readings]


def test_it_warns_at_80_percent_stops_leases_at_90_and_resumes_some_way_below():
    guard = DiskGuard(DiskConfig())
    readings = [used(percent) for percent in (50, 79.9, 80.1, 89.9, 90.1, 89, 87.6, 87.4, 79)]
    assert states(guard, *readings) == [
        Room.ENOUGH, Room.ENOUGH, Room.LOW, Room.LOW, Room.NO_LEASES, Room.NO_LEASES, Room.NO_LEASES, Room.LOW,
        Room.ENOUGH,
    ]  # fmt: skip


def test_at_95_percent_there_is_no_way_back():
    guard = DiskGuard(DiskConfig())
    assert states(guard, used(94.9), used(95.1), used(10)) == [Room.NO_LEASES, Room.NONE, Room.NONE]


def test_of_a_large_disk_the_bytes_that_are_free_count_and_not_its_share():
    guard = DiskGuard(DiskConfig(of_at_most_bytes=1000 * MIB))
    disk = 10**6 * MIB
    readings = [Reading(total_bytes=disk, free_bytes=free * MIB) for free in (5000, 201, 199, 99, 49)]
    assert states(guard, *readings) == [Room.ENOUGH, Room.ENOUGH, Room.LOW, Room.NO_LEASES, Room.NONE]


def test_a_share_of_1_is_never_reached():
    assert states(DiskGuard(NO_LIMITS), used(100)) == [Room.ENOUGH]


def test_each_change_is_an_event_and_nothing_else_is():
    guard = DiskGuard(DiskConfig())
    events = [guard.note(used(percent)) for percent in (50, 92, 92, 50, 96)]
    assert [event is None for event in events] == [True, False, True, False, False]
    assert events[1] == (
        "the run folder's disk has 80.0 MiB free; leases stop below 100.0 MiB and the run ends below 50.0 MiB "
        "(ledger.disk): leases stop until there is room"
    )
    assert "the run ends while its ledger can still be closed" in str(events[4])


@pytest.mark.parametrize(
    "wrong", [{"warn_at": 0.0}, {"warn_at": 0.95}, {"end_run_at": 1.1}, {"of_at_most_bytes": 0}]
)
def test_thresholds_out_of_order_are_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match=r"ledger\.disk"):
        DiskConfig(**wrong)


def test_a_filling_disk_stops_leases_and_takes_what_is_leased_and_a_full_one_ends_the_run(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    scheduler = make_scheduler(history=ledger)
    ends: list[LedgerError] = []
    coordinator = Coordinator(
        scheduler, ledger, Stop(), run_id="r", disk=DiskConfig(), on_full_disk=ends.append
    )
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    (lease,) = acquire(scheduler, submit.session_id, version, 1)
    coordinator.note_disk(used(91))
    assert not acquire(scheduler, submit.session_id, version, 1)
    assert any("no leases are granted until there is room" in line for line in coordinator.why())
    assert submit(make_message(lease, version)).state == "pending"
    coordinator.note_disk(used(50))
    assert len(acquire(scheduler, submit.session_id, version, 1)) == 1
    assert not ends
    coordinator.note_disk(used(97))
    coordinator.note_disk(used(98))
    assert [error.exit_status for error in ends] == [4]
    assert not acquire(scheduler, submit.session_id, version, 1)
    ledger.close()


async def test_a_process_without_a_file_to_spare_keeps_its_totals_and_its_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    coordinator = Coordinator(make_scheduler(history=ledger), ledger, Stop(), run_id="r")
    await coordinator.refresh_totals()  # starts the thread
    await ledger.write([ItemsRefused(duplicates=1)])
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
        assert (await coordinator.refresh_totals()).duplicates == 0
        assert "the totals stay as they were" in caplog.text
        allow_most_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
        assert (await coordinator.refresh_totals()).duplicates == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
    ledger.close()


def test_ballast_takes_its_room_until_it_is_released(tmp_path: Path):
    path = tmp_path / "ballast"
    ballast = Ballast(path, MIB)
    ballast.hold()
    assert path.stat().st_blocks * 512 >= MIB
    ballast.release()
    ballast.release()
    assert not path.exists()


def test_without_room_for_ballast_a_run_goes_on_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "ballast"
    Ballast(path, 2**60).hold()
    assert not path.exists()
    assert "no room for a ballast" in caplog.text
