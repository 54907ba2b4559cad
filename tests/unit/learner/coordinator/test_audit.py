"""The audit of a ledger, on runs that are sound and on runs that are not."""

from __future__ import annotations

import json
from pathlib import Path

import apsw
import pytest

from learner.coordinator.audit import audit
from learner.coordinator.ledger import Ledger
from penstock.cli import main as penstock
from penstock.errors import LedgerError
from penstock.trajectory import PolicyVersion

from .fakes import Submitter, acquire, join, make_message, make_scheduler, publish, start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The ledger of a run of three steps, the last of which was trained again by a second trainer."""
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    scheduler = make_scheduler(history=ledger)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    for step in range(3):
        for lease in acquire(scheduler, submit.session_id, version):
            submit(make_message(lease, version))
        scheduler.lineage.next_batch(version.epoch, step)
        version = publish(scheduler, PolicyVersion(version.epoch, step + 1))
        ledger.write_blocking(scheduler.take_records())
    epoch = scheduler.lineage.open(2, ledger.groups_trained_from(2))
    publish(scheduler, PolicyVersion(epoch, 2))
    scheduler.lineage.next_batch(epoch, 2)
    publish(scheduler, PolicyVersion(epoch, 3))
    ledger.write_blocking(scheduler.take_records())
    ledger.close()
    return path


def test_a_sound_ledger_passes(path: Path):
    found = audit(path)
    assert not found.violations
    assert found.lineages == ((1, 0), (2, 2))
    assert (found.newest, found.num_steps, found.payloads_from) == ((2, 3), 3, 0)


@pytest.mark.parametrize(
    ("broken", "sql"),
    [
        ("conservation", "UPDATE tallies SET value = value + 1 WHERE name = 'accepted'"),
        ("payloads", "UPDATE trajectories SET checksum = 0"),
        ("payloads", "UPDATE trajectories SET offset = offset + 1"),
        ("I1", "UPDATE trajectories SET step = step + 1 WHERE state = 'trained' AND slot = 0"),
        ("I1", "UPDATE trajectories SET segment = NULL"),
        ("I1", "UPDATE trajectories SET trajectory_id = 'same'"),
        ("I1", "DELETE FROM leases WHERE group_id = 0"),
        ("I2", "UPDATE groups SET step = 0 WHERE step = 1"),
        ("I2", "UPDATE trajectories SET slot = 0"),
        ("I3", "UPDATE sessions SET acknowledged = 3"),
        ("I3", "UPDATE trajectories SET sequence = 1"),
        ("I4", "UPDATE versions SET digest = 'another' WHERE epoch = 2 AND step = 2"),
        ("I6", "UPDATE groups SET num_slots = 1"),
        ("I6", "UPDATE trajectories SET observation_digest = slot"),
        ("I7", "UPDATE trajectories SET lag = 2 WHERE step = 2"),
        ("I9", "DELETE FROM versions WHERE epoch = 1 AND step = 1"),
        ("I9", "UPDATE lineages SET epoch = 3 WHERE epoch = 2"),
        ("I10", "UPDATE tallies SET value = 0 WHERE name = 'state:trained'"),
        ("I10", "UPDATE segments SET num_payloads = 1"),
    ],
)
def test_a_broken_invariant_is_named(path: Path, broken: str, sql: str):
    db = apsw.Connection(str(path))
    db.execute(sql)
    assert db.changes()
    db.close()
    found = audit(path)
    assert broken in found.failed
    assert all(violation.message for violation in found.violations)


def test_the_command_says_which_invariants_fail(path: Path, capsys: pytest.CaptureFixture[str]):
    assert penstock(["ledger", str(path.parent)]) == 0
    assert "ok     I2" in capsys.readouterr().out
    db = apsw.Connection(str(path))
    db.execute("UPDATE tallies SET value = 99 WHERE name = 'accepted'")
    db.close()
    assert penstock(["ledger", str(path.parent), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["failed"] == ["conservation"]


def test_a_flipped_byte_is_found_wherever_it_lies(path: Path):
    sound = path.read_bytes()
    for place in range(4096, len(sound), 16_384):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(LedgerError, match="checksum"):
            Ledger(path).close()
        with pytest.raises(LedgerError):
            audit(path)
    path.write_bytes(sound)
    assert not audit(path).violations


def test_a_flipped_byte_is_found_wherever_it_lies_in_a_segment(path: Path):
    (segment,) = (path.parent / "payloads").iterdir()
    sound = segment.read_bytes()
    for place in range(0, len(sound), 37):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        segment.write_bytes(damaged)
        assert audit(path).failed == ("payloads",)
    segment.write_bytes(sound[:-1])
    assert audit(path).failed == ("payloads",)


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert penstock(["ledger", str(tmp_path)]) == 4
    assert "no such ledger" in capsys.readouterr().err
