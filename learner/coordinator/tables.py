"""How records change the ledger's tables: one function a kind of record.

Records that only add, or that each change a row of their own, may be written in any order
among themselves: those that stand next to each other are gathered by kind and written many
rows to a statement. SQLite then works for long stretches, during which the event loop's
thread has the interpreter for itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import apsw

from learner.coordinator.evaluation import tables as evaluation_tables
from learner.coordinator.records import (
    BatchAssigned,
    BatchTrained,
    CheckpointWritten,
    EventLogged,
    GroupDropped,
    GroupOpened,
    ItemsRefused,
    LeaseEnded,
    LeaseGranted,
    LineageOpened,
    PartialStored,
    PauseSet,
    Record,
    RunFinished,
    SequenceAdvanced,
    SessionClosed,
    SessionOpened,
    TrajectoryState,
    TrajectoryStored,
    VersionPublished,
)
from learner.coordinator.segments import Place, SegmentWriter

_ROWS_A_STATEMENT = (64, 8, 1)


def apply(db: apsw.Connection, records: Iterable[Record], payloads: SegmentWriter) -> list[int]:
    """Writes records, within the caller's transaction, and their payloads, which must be synced before it ends.

    Returns the segments that no row names any more. Raises apsw.Error, OSError.
    """
    transaction = _Transaction(db, payloads)
    gathered: defaultdict[type, list[Any]] = defaultdict(list)
    for record in records:
        kind = type(record)
        if kind in _GATHERED:
            gathered[kind].append(record)
        else:
            _write_gathered(transaction, gathered)
            _SINGLY[kind](transaction, record)
    _write_gathered(transaction, gathered)
    transaction.write_tallies()
    return transaction.drop_segments()


def signed(checksum: int) -> int:
    """64 unsigned bits as SQLite keeps them."""
    return checksum - (1 << 64) if checksum >> 63 else checksum


def unsigned(checksum: int) -> int:
    """What `signed` was given."""
    return checksum % (1 << 64)


def places(rows: Iterable[tuple[int, int, int, int]]) -> Iterator[Place]:
    """Of rows (segment, offset, num_bytes, checksum) of trajectories."""
    for segment, offset, num_bytes, checksum in rows:
        yield Place(segment, offset, num_bytes, unsigned(checksum))


def recount(db: apsw.Connection) -> None:
    """Sets every tally that tells of rows to what the rows say. `accepted` is left: it is what they must add up to."""
    db.execute(
        "DELETE FROM tallies WHERE name LIKE 'state:%' OR name LIKE 'environment:%' "
        "OR name IN ('lag_trained', 'mixed_trained', 'tokens_trained')"
    )
    for name in ("state", "environment"):
        db.execute(
            f"INSERT INTO tallies SELECT '{name}:' || {name}, count(*) FROM trajectories GROUP BY {name}"  # noqa: S608
        )
    trained = "FROM trajectories WHERE state = 'trained'"
    db.execute(f"INSERT INTO tallies SELECT 'lag_trained', coalesce(max(lag), 0) {trained}")
    db.execute(f"INSERT INTO tallies SELECT 'mixed_trained', coalesce(sum(mixed), 0) {trained}")
    db.execute(f"INSERT INTO tallies SELECT 'tokens_trained', coalesce(sum(num_sampled), 0) {trained}")
    db.execute(
        "UPDATE segments SET num_payloads = coalesce(n, 0) FROM (SELECT number AS s, n FROM segments LEFT JOIN "
        "(SELECT segment, count(*) AS n FROM trajectories GROUP BY segment) ON number = segment) WHERE number = s"
    )


class _Transaction:
    """One commit: statements, and changes of tallies, which are written once at its end."""

    def __init__(self, db: apsw.Connection, payloads: SegmentWriter) -> None:
        self._db = db
        self._payloads = payloads
        self._forgot = False
        self._tallies: Counter[str] = Counter()
        self._lag = 0

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> apsw.Cursor:
        return self._db.execute(sql, parameters)

    def execute_many(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Executes a statement, whose VALUES are written {}, over all rows."""
        start = 0
        for size in _ROWS_A_STATEMENT:
            while len(rows) - start >= size:
                values = ",".join(["(" + ",".join("?" * len(rows[0])) + ")"] * size)
                self._db.execute(sql.format(values), tuple(chain.from_iterable(rows[start : start + size])))
                start += size

    def store(self, payloads: Sequence[bytes]) -> tuple[int, list[int]]:
        """The segment that payloads now lie in, and their offsets."""
        segment, offsets = self._payloads.append(payloads)
        self._db.execute(
            "INSERT INTO segments VALUES (?, ?) ON CONFLICT (number) "
            "DO UPDATE SET num_payloads = num_payloads + excluded.num_payloads",
            (segment, len(payloads)),
        )
        return segment, offsets

    def forget(self, which: str, parameters: Sequence[Any]) -> None:
        """The payloads of these trajectories are needed no more. which: a condition in SQL."""
        which += " AND segment IS NOT NULL"
        counts = "SELECT segment AS s, count(*) AS n FROM trajectories WHERE"
        self._db.execute(
            f"UPDATE segments SET num_payloads = num_payloads - n FROM ({counts} {which} GROUP BY segment) "  # noqa: S608
            "WHERE number = s",
            parameters,
        )
        self._db.execute(f"UPDATE trajectories SET segment = NULL WHERE {which}", parameters)  # noqa: S608
        self._forgot = True

    def drop_segments(self) -> list[int]:
        """Ends segments that no row names. The newest stays, for it may be written to."""
        if not self._forgot:
            return []
        gone = self._db.execute(
            "DELETE FROM segments WHERE num_payloads = 0 AND number < (SELECT max(number) FROM segments) "
            "RETURNING number"
        )
        return [number for (number,) in gone]

    @property
    def num_changed(self) -> int:
        """Rows that the last statement changed."""
        return self._db.changes()

    def add(self, name: str, value: int) -> None:
        self._tallies[name] += value

    def raise_lag(self, lag: int) -> None:
        self._lag = max(self._lag, lag)

    def recount(self) -> None:
        self.write_tallies()
        recount(self._db)

    def write_tallies(self) -> None:
        upsert = "INSERT INTO tallies VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = "
        for name, value in self._tallies.items():
            self._db.execute(upsert + "value + excluded.value", (name, value))
        if self._lag:
            self._db.execute(upsert + "max(value, excluded.value)", ("lag_trained", self._lag))
        self._tallies.clear()
        self._lag = 0


def _write_gathered(db: _Transaction, gathered: defaultdict[type, list[Any]]) -> None:
    for kind, write in _GATHERED.items():
        if kind in gathered:
            write(db, gathered.pop(kind))


def _sessions_opened(db: _Transaction, records: Sequence[SessionOpened]) -> None:
    rows = [(r.session_id, r.actor_id, r.number) for r in records]
    db.execute_many("INSERT INTO sessions (session_id, actor_id, number) VALUES {}", rows)


def _sessions_closed(db: _Transaction, records: Sequence[SessionClosed]) -> None:
    for r in records:
        db.execute("UPDATE sessions SET closed = ? WHERE session_id = ?", (r.reason, r.session_id))


def _groups_opened(db: _Transaction, records: Sequence[GroupOpened]) -> None:
    db.execute_many(
        "INSERT INTO groups (group_id, environment, split, task_index, seed, born_epoch, born_step, num_slots) "
        "VALUES {}",
        [
            (r.group_id, task.environment, task.split, task.index, str(task.seed), *r.born, r.num_slots)
            for r in records
            for task in (r.task,)
        ],
    )


def _leases_granted(db: _Transaction, records: Sequence[LeaseGranted]) -> None:
    rows = [(r.group_id, r.slot, r.attempt, r.session_id) for r in records]
    db.execute_many("INSERT INTO leases (group_id, slot, attempt, session_id) VALUES {}", rows)


def _partials_stored(db: _Transaction, records: Sequence[PartialStored]) -> None:
    for r in records:
        db.execute(
            "INSERT OR REPLACE INTO partials VALUES (?, ?, ?, ?, ?, ?, ?)",
            (r.group_id, r.slot, *r.newest, r.num_tokens, r.payload, signed(r.checksum)),
        )
    db.add("handed_over", len(records))


def _leases_ended(db: _Transaction, records: Sequence[LeaseEnded]) -> None:
    db.execute_many(
        "UPDATE leases SET outcome = ended.column4, message = ended.column5 FROM (VALUES {}) AS ended "
        "WHERE (group_id, slot, attempt) = (ended.column1, ended.column2, ended.column3)",
        records,
    )


def _trajectories_stored(db: _Transaction, records: Sequence[TrajectoryStored]) -> None:
    payloads = [r.payload for r in records if r.payload is not None]
    segment, offsets = db.store(payloads) if payloads else (0, [])
    offset = iter(offsets)
    db.execute_many(
        "INSERT INTO trajectories (trajectory_id, group_id, slot, attempt, session_id, sequence, state, "
        "environment, oldest_step, num_sampled, mixed, reward, observation_digest, segment, offset, num_bytes, "
        "checksum) VALUES {}",
        [
            (*r[:13], None, 0, 0, 0)
            if r.payload is None
            else (*r[:13], segment, next(offset), len(r.payload), signed(r.checksum))
            for r in records
        ],
    )
    _sequences_advanced(db, [SequenceAdvanced(r.session_id, r.sequence) for r in records])
    db.add("accepted", len(records))
    for state, count in Counter(r.state for r in records).items():
        db.add(f"state:{state}", count)
    for environment, count in Counter(r.environment for r in records).items():
        db.add(f"environment:{environment}", count)


def _items_refused(db: _Transaction, records: Sequence[ItemsRefused]) -> None:
    duplicates = sum(r.duplicates for r in records)
    if duplicates:
        db.add("duplicate", duplicates)
    for code, count in Counter(code for r in records for code in r.rejected).items():
        db.add(f"rejected:{code}", count)


def _sequences_advanced(db: _Transaction, records: Sequence[SequenceAdvanced]) -> None:
    newest = {r.session_id: r for r in records}
    db.execute_many(
        "UPDATE sessions SET acknowledged = max(acknowledged, advanced.column2) FROM (VALUES {}) AS advanced "
        "WHERE session_id = advanced.column1",
        tuple(newest.values()),
    )


def _group_dropped(db: _Transaction, r: GroupDropped) -> None:
    db.execute(
        "UPDATE groups SET state = 'dropped', step = NULL, reason = ? WHERE group_id = ?",
        (r.reason, r.group_id),
    )
    db.execute("DELETE FROM partials WHERE group_id = ?", (r.group_id,))
    pending = "group_id = ? AND state = 'pending'"
    db.forget(pending, (r.group_id,))
    db.execute(f"UPDATE trajectories SET state = ? WHERE {pending}", (r.state, r.group_id))  # noqa: S608
    _move(db, db.num_changed, TrajectoryState.PENDING, r.state)


def _version_published(db: _Transaction, r: VersionPublished) -> None:
    db.execute(
        "INSERT INTO versions (epoch, step, digest, manifest, metrics) VALUES (?, ?, ?, ?, ?)",
        (*r.version, r.digest, r.manifest, r.metrics),
    )


def _batch_assigned(db: _Transaction, r: BatchAssigned) -> None:
    for group_id in r.group_ids:
        db.execute("UPDATE groups SET state = 'assigned', step = ? WHERE group_id = ?", (r.step, group_id))


def _batch_trained(db: _Transaction, r: BatchTrained) -> None:
    for group_id in r.group_ids:
        db.execute("UPDATE groups SET state = 'trained', step = ? WHERE group_id = ?", (r.step, group_id))
        db.execute("DELETE FROM partials WHERE group_id = ?", (group_id,))
        db.execute(
            "UPDATE trajectories SET state = 'trained', step = ?1, lag = max(0, ?1 - oldest_step) "
            "WHERE group_id = ?2 AND state = 'pending'",
            (r.step, group_id),
        )
        _move(db, db.num_changed, TrajectoryState.PENDING, TrajectoryState.TRAINED)
        ((lag, mixed, tokens),) = db.execute(
            "SELECT coalesce(max(lag), 0), coalesce(sum(mixed), 0), coalesce(sum(num_sampled), 0) "
            "FROM trajectories WHERE group_id = ? AND state = 'trained'",
            (group_id,),
        )
        db.raise_lag(lag)
        db.add("mixed_trained", mixed)
        db.add("tokens_trained", tokens)


def _lineage_opened(db: _Transaction, r: LineageOpened) -> None:
    db.execute("INSERT INTO lineages (epoch, step, max_lag) VALUES (?, ?, ?)", (r.epoch, r.step, r.max_lag))
    db.execute("DELETE FROM meta WHERE name = 'finished'")
    again = "state = 'trained' AND step >= ?"
    db.execute(
        "UPDATE trajectories SET state = 'pending', step = NULL, lag = NULL "  # noqa: S608
        f"WHERE state = 'trained' AND group_id IN (SELECT group_id FROM groups WHERE {again})",
        (r.step,),
    )
    db.execute(
        "UPDATE groups SET state = 'open', step = NULL "
        "WHERE state = 'assigned' OR (state = 'trained' AND step >= ?)",
        (r.step,),
    )
    for group_id, born in r.reborn:
        db.execute("UPDATE groups SET born_epoch = ?, born_step = ? WHERE group_id = ?", (*born, group_id))
    db.execute("DELETE FROM checkpoints WHERE step > ?", (r.step,))
    db.execute("UPDATE meta SET value = min(CAST(value AS INTEGER), ?) WHERE name = 'forgotten'", (r.step,))
    db.recount()


def _checkpoint_written(db: _Transaction, r: CheckpointWritten) -> None:
    db.execute(
        "INSERT OR REPLACE INTO checkpoints (epoch, step, path, digest) VALUES (?, ?, ?, ?)",
        (*r.version, r.path, r.digest),
    )
    kept = db.execute("SELECT step FROM checkpoints ORDER BY step DESC LIMIT ?", (r.keep,)).fetchall()
    covered = kept[-1][0] if len(kept) == r.keep else 0
    db.execute("DELETE FROM checkpoints WHERE step < ?", (covered,))
    if r.keep_payloads:
        return
    before = db.execute("SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'forgotten'").fetchall()
    db.forget(
        "state = 'trained' AND group_id IN "
        "(SELECT group_id FROM groups WHERE state = 'trained' AND step >= ? AND step < ?)",
        (before[0][0] if before else 0, covered),
    )
    db.execute("INSERT OR REPLACE INTO meta VALUES ('forgotten', ?)", (str(covered),))


def _run_finished(db: _Transaction, r: RunFinished) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('finished', ?)", (str(r.step),))


def _pause_set(db: _Transaction, r: PauseSet) -> None:
    db.execute("DELETE FROM meta WHERE name = 'paused'")
    if r.paused:
        db.execute("INSERT INTO meta VALUES ('paused', '')")


def _move(db: _Transaction, count: int, before: TrajectoryState, after: TrajectoryState) -> None:
    db.add(f"state:{before}", -count)
    db.add(f"state:{after}", count)


def _events_logged(db: _Transaction, records: Sequence[EventLogged]) -> None:
    rows = [(r.time, r.kind, r.message) for r in records]
    db.execute_many("INSERT INTO events (time, kind, message) VALUES {}", rows)


_GATHERED: dict[type, Callable[[_Transaction, Any], None]] = {
    SessionOpened: _sessions_opened,
    GroupOpened: _groups_opened,
    LeaseGranted: _leases_granted,
    TrajectoryStored: _trajectories_stored,
    PartialStored: _partials_stored,
    LeaseEnded: _leases_ended,
    SequenceAdvanced: _sequences_advanced,
    SessionClosed: _sessions_closed,
    ItemsRefused: _items_refused,
    EventLogged: _events_logged,
    **evaluation_tables.GATHERED,
}
"""In the order in which they are written: a row is added before it is changed."""

_SINGLY: dict[type, Callable[[_Transaction, Any], None]] = {
    GroupDropped: _group_dropped,
    VersionPublished: _version_published,
    BatchAssigned: _batch_assigned,
    BatchTrained: _batch_trained,
    LineageOpened: _lineage_opened,
    CheckpointWritten: _checkpoint_written,
    RunFinished: _run_finished,
    PauseSet: _pause_set,
    **evaluation_tables.SINGLY,
}
"""Records that change what others wrote, and so stay in their place among them."""
