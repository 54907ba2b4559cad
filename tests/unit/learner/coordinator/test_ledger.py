from pathlib import Path

import apsw
import pytest

from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.ledger import Ledger
from learner.coordinator.records import (
    BatchTrained,
    CheckpointWritten,
    EventLogged,
    GroupDropped,
    GroupOpened,
    ItemsRefused,
    LeaseEnded,
    LeaseGranted,
    LineageOpened,
    Record,
    SequenceAdvanced,
    SessionOpened,
    TrajectoryState,
    TrajectoryStored,
    VersionPublished,
)
from penstock.codec import checksum
from penstock.errors import ConfigError, LedgerError
from penstock.trajectory import PolicyVersion, Task

V0, V1 = PolicyVersion(1, 0), PolicyVersion(1, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def group(group_id: int, num_slots: int = 2) -> list[Record]:
    task = Task("words", "train", group_id, 2**64 - 1)
    return [GroupOpened(group_id=group_id, task=task, born=V0, num_slots=num_slots)]


def stored(
    group_id: int, slot: int, state: TrajectoryState = TrajectoryState.PENDING, **changes: object
) -> TrajectoryStored:
    fields: dict[str, object] = {
        "trajectory_id": f"{group_id:016x}{slot:016x}",
        "group_id": group_id,
        "slot": slot,
        "attempt": 0,
        "session_id": "s",
        "sequence": 1,
        "state": state,
        "environment": "words",
        "oldest_step": 0,
        "num_sampled": 3,
        "mixed": False,
        "reward": 1.0,
        "observation_digest": "d",
        "payload": b"tokens" if state is TrajectoryState.PENDING else None,
        "checksum": checksum(b"tokens"),
    }
    return TrajectoryStored(**(fields | changes))  # type: ignore[arg-type]


def segments_of(path: Path) -> list[str]:
    return sorted(file.stem for file in (path.parent / "payloads").iterdir())


def published(version: PolicyVersion) -> VersionPublished:
    return VersionPublished(version=version, digest=f"of {version}", manifest=b"m", metrics="{}")


async def test_what_was_written_is_there_after_the_process_dies(path: Path):
    ledger = Ledger(path)
    await ledger.write([*group(0), stored(0, 0)])
    # No close: another connection sees only what is committed.
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    assert db.execute("SELECT count(*) FROM trajectories").fetchall() == [(1,)]
    assert db.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    ledger.close()


def test_a_run_goes_on_where_it_was(path: Path):
    first = Ledger(path)
    granted = LeaseGranted(group_id=0, slot=1, attempt=0, session_id="s")
    first.write_blocking(
        [LineageOpened(epoch=1, step=0, max_lag=2), published(V0), *group(0), granted, stored(0, 0)]
    )
    run_id = first.recover().run_id
    first.close()
    second = Ledger(path)
    found = second.recover()
    assert (found.run_id, found.epoch, found.next_group_id) == (run_id, 1, 1)
    assert found.versions == {V0: "of 1.0"}
    assert found.live_leases == ((0, 1, 0),)
    (open_group,) = found.open_groups
    assert open_group.task == Task("words", "train", 0, 2**64 - 1)
    assert [member.trajectory_id for member in open_group.members] == [f"{0:016x}{0:016x}"]
    assert open_group.slots[1].next_attempt == 1
    second.close()


def test_accepted_is_the_sum_of_the_states(path: Path):
    ledger = Ledger(path)
    states = [
        TrajectoryState.PENDING,
        TrajectoryState.PENDING,
        TrajectoryState.SURPLUS,
        TrajectoryState.STALE,
    ]
    ledger.write_blocking([*group(0, 4), *(stored(0, slot, state) for slot, state in enumerate(states))])
    ledger.write_blocking([BatchTrained(step=0, group_ids=(0,))])
    totals = ledger.totals()
    assert totals.accepted == 4
    assert totals.imbalance == 0
    assert totals.by_state == {"trained": 2, "surplus": 1, "stale": 1}
    ledger.close()


def test_a_lost_row_shows_as_imbalance(path: Path):
    ledger = Ledger(path)
    ledger.write_blocking([*group(0), stored(0, 0), stored(0, 1)])
    thief = apsw.Connection(str(path))
    thief.execute("DELETE FROM trajectories WHERE slot = 1")
    ledger.close()
    again = Ledger(path)
    assert again.totals().imbalance == 1, "the start counts the rows"
    again.close()


def test_lag_is_counted_from_the_oldest_token(path: Path):
    ledger = Ledger(path)
    ledger.write_blocking([*group(0), stored(0, 0, oldest_step=3), stored(0, 1, oldest_step=7, mixed=True)])
    ledger.write_blocking([BatchTrained(step=5, group_ids=(0,))])
    totals = ledger.totals()
    assert totals.max_lag_trained == 2
    assert totals.mixed_version_trained == 1
    assert totals.tokens_trained == 6
    ledger.close()


def test_a_new_lineage_voids_what_was_trained_after_its_checkpoint(path: Path):
    ledger = Ledger(path)
    for step in range(3):
        ledger.write_blocking(
            [*group(step), stored(step, 0), stored(step, 1), BatchTrained(step=step, group_ids=(step,))]
        )
    assert [g.group_id for g in ledger.groups_trained_from(1)] == [1, 2]
    ledger.write_blocking([LineageOpened(epoch=2, step=1, max_lag=2)])
    found = ledger.recover()
    assert [g.group_id for g in found.open_groups] == [1, 2]
    assert all(g.is_ready for g in found.open_groups)
    assert ledger.totals().by_state == {"trained": 2, "pending": 4}
    assert ledger.payloads(2, [stored(2, 1).trajectory_id]) == [b"tokens"]
    ledger.close()


def test_payloads_are_deleted_once_every_kept_checkpoint_covers_them(path: Path):
    ledger = Ledger(path, segment_bytes=6)
    for step in range(4):
        ledger.write_blocking([*group(step), stored(step, 0), BatchTrained(step=step, group_ids=(step,))])
    assert segments_of(path) == ["00000001", "00000002", "00000003", "00000004"]
    for step in (1, 3):
        checkpoint = CheckpointWritten(version=PolicyVersion(1, step), path="p", digest="d", keep=2)
        ledger.write_blocking([checkpoint])
    assert segments_of(path) == ["00000002", "00000003", "00000004"]
    with pytest.raises(LedgerError, match="payload was deleted"):
        ledger.payloads(0, [stored(0, 0).trajectory_id])
    assert ledger.payloads(1, [stored(1, 0).trajectory_id]) == [b"tokens"]
    ledger.close()


def test_a_segment_stays_while_one_of_its_payloads_is_needed(path: Path):
    ledger = Ledger(path, segment_bytes=18)
    for step in range(4):
        ledger.write_blocking([*group(step), stored(step, 0), BatchTrained(step=step, group_ids=(step,))])
    for step, kept in ((2, ["00000001", "00000002"]), (3, ["00000002"])):
        ledger.write_blocking(
            [CheckpointWritten(version=PolicyVersion(1, step), path="p", digest="d", keep=1)]
        )
        assert segments_of(path) == kept
    ledger.close()


def test_payloads_that_no_row_names_are_deleted_at_the_start(path: Path):
    """Of a commit that never came to be: its process died after the sync of the segment."""
    ledger = Ledger(path)
    ledger.write_blocking([*group(0), stored(0, 0)])
    ledger.close()
    orphan = path.parent / "payloads" / "00000002.segment"
    orphan.write_bytes(b"torn")
    again = Ledger(path)
    assert segments_of(path) == ["00000001"]
    again.write_blocking([stored(0, 1)])
    assert segments_of(path) == ["00000001", "00000002"], "an older segment is not written to"
    assert again.payloads(0, [stored(0, slot).trajectory_id for slot in (1, 0)]) == [b"tokens"] * 2
    again.close()


@pytest.mark.parametrize("damage", [b"tokenstokenz", b"tokens", None])
def test_a_ledger_whose_pending_payloads_are_damaged_or_gone_is_not_started_on(
    path: Path, damage: bytes | None
):
    ledger = Ledger(path)
    ledger.write_blocking([*group(0), stored(0, 0), stored(0, 1)])
    ledger.close()
    (segment,) = (path.parent / "payloads").iterdir()
    if damage is None:
        segment.unlink()
    else:
        segment.write_bytes(damage)
    with pytest.raises(LedgerError, match="must not be trained on"):
        Ledger(path)


def test_a_ledger_of_an_older_format_is_refused(path: Path):
    Ledger(path).close()
    db = apsw.Connection(str(path))
    db.execute("UPDATE meta SET value = '3' WHERE name = 'format'")
    db.close()
    with pytest.raises(ConfigError, match="format is 3; this version of penstock reads 5"):
        Ledger(path)


def test_dropping_a_group_ends_its_pending_trajectories_only(path: Path):
    ledger = Ledger(path)
    drop = GroupDropped(group_id=0, state=TrajectoryState.GROUP_DROPPED, reason="r")
    ledger.write_blocking([*group(0), stored(0, 0), stored(0, 1, TrajectoryState.SURPLUS), drop])
    assert ledger.totals().by_state == {"group_dropped": 1, "surplus": 1}
    assert ledger.recover().open_groups == ()
    ledger.close()


def test_faults_of_a_slot_and_deaths_of_a_group_are_remembered(path: Path):
    ledger = Ledger(path)
    records: list[Record] = group(0)
    for attempt, outcome in enumerate([LeaseOutcome.DATA, LeaseOutcome.INFRASTRUCTURE, LeaseOutcome.DEAD]):
        records += [
            LeaseGranted(group_id=0, slot=0, attempt=attempt, session_id=f"s{attempt}"),
            LeaseEnded(group_id=0, slot=0, attempt=attempt, outcome=outcome),
        ]
    ledger.write_blocking(records)
    (found,) = ledger.recover().open_groups
    assert found.slots[0].faults == {LeaseOutcome.DATA: 1, LeaseOutcome.INFRASTRUCTURE: 1}
    assert found.deaths == {"s2"}
    ledger.close()


def test_refused_items_are_counted_by_code(path: Path):
    ledger = Ledger(path)
    ledger.write_blocking([ItemsRefused(duplicates=2, rejected=("bad_id", "bad_id", "bad_mask"))])
    totals = ledger.totals()
    assert (totals.duplicates, totals.rejected) == (2, {"bad_id": 2, "bad_mask": 1})
    ledger.close()


def test_events_are_read_after_a_cursor(path: Path):
    ledger = Ledger(path)
    ledger.write_blocking([EventLogged(kind="k", message=str(n), time=float(n)) for n in range(3)])
    assert [message for _, _, _, message in ledger.events_after(1)] == ["1", "2"]
    ledger.close()


def test_a_payload_that_the_disk_changed_is_not_handed_out(path: Path):
    fatal: list[LedgerError] = []
    ledger = Ledger(path, on_fatal=fatal.append)
    ledger.write_blocking([*group(0), stored(0, 0), stored(0, 1)])
    (segment,) = (path.parent / "payloads").iterdir()
    segment.write_bytes(b"tokenstokenz")
    assert ledger.payloads(0, [stored(0, 0).trajectory_id]) == [b"tokens"]
    with pytest.raises(LedgerError, match="must not be trained on"):
        ledger.payloads(0, [stored(0, 1).trajectory_id])
    assert len(fatal) == 1, "the process must end"
    with pytest.raises(LedgerError):
        ledger.write_blocking([*group(1)])
    ledger.close()


def test_records_written_together_leave_what_they_leave_one_by_one(tmp_path: Path):
    """Also over the 64 rows that one statement takes, and around a record that keeps its place."""
    granted = [
        LeaseGranted(group_id=g, slot=s, attempt=0, session_id="s") for g in range(3) for s in range(50)
    ]
    records = [
        SessionOpened(session_id="s", actor_id="a", number=1),
        *(record for g in range(3) for record in group(g, 50)),
        *granted,
    ]
    for number, lease in enumerate(granted, start=1):
        records += [
            SequenceAdvanced("s", number),
            stored(lease.group_id, lease.slot),
            ItemsRefused(duplicates=1, rejected=("empty",)),
            EventLogged(kind="rejected", message=str(number), time=float(number)),
        ]
        if number == 120:
            records.append(GroupDropped(group_id=1, state=TrajectoryState.STALE, reason="late"))
    dumps = []
    for name, pieces in {"together": [records], "singly": [[record] for record in records]}.items():
        ledger = Ledger(tmp_path / name / "ledger.sqlite")
        for piece in pieces:
            ledger.write_blocking(piece)
        tables = ("sessions", "groups", "leases", "trajectories", "segments", "tallies", "events")
        db = apsw.Connection(str(ledger.path), flags=apsw.SQLITE_OPEN_READONLY)
        dumps.append({table: db.execute(f"SELECT * FROM {table}").fetchall() for table in tables})
        ledger.close()
    assert dumps[0] == dumps[1]
    assert ("s", "a", 1, 150, None) in dumps[0]["sessions"]
    assert dumps[0]["segments"] == [(1, 100)], "those of the dropped group are not counted"


async def test_nothing_is_acknowledged_after_a_failed_commit(path: Path):
    failures: list[LedgerError] = []
    ledger = Ledger(path, on_fatal=failures.append)
    await ledger.write([*group(0), stored(0, 0)])
    with pytest.raises(LedgerError):
        await ledger.write([stored(0, 0)])  # violates the primary key: the commit fails
    with pytest.raises(LedgerError):
        await ledger.write([stored(0, 1)])
    assert len(failures) == 1
    assert ledger.totals().accepted == 1
    ledger.close()


def test_a_value_that_sqlite_cannot_hold_is_fatal_and_leaves_nobody_waiting(path: Path):
    failures: list[LedgerError] = []
    ledger = Ledger(path, on_fatal=failures.append)
    for record in (stored(0, 0, num_sampled=2**63), stored(0, 1)):
        with pytest.raises(LedgerError, match="OverflowError"):
            ledger.write_blocking([*group(0), record], timeout_seconds=10.0)
    assert len(failures) == 1
    assert ledger.totals().accepted == 0
    ledger.close()


def test_two_learners_cannot_share_a_folder(path: Path):
    first = Ledger(path)
    with pytest.raises(ConfigError, match="another learner is running"):
        Ledger(path)
    first.close()
    Ledger(path).close()


def test_a_file_that_is_no_ledger_is_refused(path: Path):
    path.write_bytes(b"this is not a database, but it is long enough to look at" * 100)
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(path)
