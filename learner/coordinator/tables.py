"""How each record changes the ledger's tables: one function a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import apsw

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
    Record,
    RunFinished,
    SequenceAdvanced,
    SessionClosed,
    SessionOpened,
    TrajectoryState,
    TrajectoryStored,
    VersionPublished,
)


def apply(db: apsw.Connection, records: Iterable[Record]) -> None:
    """Writes records, within the caller's transaction. Raises apsw.Error."""
    transaction = _Transaction(db)
    for record in records:
        _WRITERS[type(record)](transaction, record)
    transaction.write_tallies()


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


class _Transaction:
    """One commit: statements, and changes of tallies, which are written once at its end."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self._tallies: Counter[str] = Counter()
        self._lag = 0

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> apsw.Cursor:
        return self._db.execute(sql, parameters)

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


def _session_opened(db: _Transaction, r: SessionOpened) -> None:
    db.execute(
        "INSERT INTO sessions (session_id, actor_id, number) VALUES (?, ?, ?)",
        (r.session_id, r.actor_id, r.number),
    )


def _session_closed(db: _Transaction, r: SessionClosed) -> None:
    db.execute("UPDATE sessions SET closed = ? WHERE session_id = ?", (r.reason, r.session_id))


def _group_opened(db: _Transaction, r: GroupOpened) -> None:
    task = r.task
    db.execute(
        "INSERT INTO groups (group_id, environment, split, task_index, seed, born_epoch, born_step, num_slots) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (r.group_id, task.environment, task.split, task.index, str(task.seed), *r.born, r.num_slots),
    )


def _lease_granted(db: _Transaction, r: LeaseGranted) -> None:
    db.execute(
        "INSERT INTO leases (lease_id, group_id, slot, attempt, session_id) VALUES (?, ?, ?, ?, ?)",
        (r.lease_id, r.group_id, r.slot, r.attempt, r.session_id),
    )


def _lease_ended(db: _Transaction, r: LeaseEnded) -> None:
    db.execute(
        "UPDATE leases SET outcome = ?, message = ? WHERE lease_id = ?", (r.outcome, r.message, r.lease_id)
    )


def _trajectory_stored(db: _Transaction, r: TrajectoryStored) -> None:
    db.execute(
        "INSERT INTO trajectories (trajectory_id, lease_id, group_id, slot, session_id, sequence, state, "
        "environment, oldest_step, num_sampled, mixed, reward, observation_digest) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            r.trajectory_id,
            r.lease_id,
            r.group_id,
            r.slot,
            r.session_id,
            r.sequence,
            r.state,
            r.environment,
            r.oldest_step,
            r.num_sampled,
            r.mixed,
            r.reward,
            r.observation_digest,
        ),
    )
    if r.payload is not None:
        db.execute("INSERT INTO payloads VALUES (?, ?)", (r.trajectory_id, r.payload))
    for tally in ("accepted", f"state:{r.state}", f"environment:{r.environment}"):
        db.add(tally, 1)


def _items_refused(db: _Transaction, r: ItemsRefused) -> None:
    if r.duplicates:
        db.add("duplicate", r.duplicates)
    for code, count in Counter(r.rejected).items():
        db.add(f"rejected:{code}", count)


def _sequence_advanced(db: _Transaction, r: SequenceAdvanced) -> None:
    db.execute("UPDATE sessions SET acknowledged = ? WHERE session_id = ?", (r.sequence, r.session_id))


def _group_dropped(db: _Transaction, r: GroupDropped) -> None:
    db.execute(
        "UPDATE groups SET state = 'dropped', step = NULL, reason = ? WHERE group_id = ?",
        (r.reason, r.group_id),
    )
    pending = "group_id = ? AND state = 'pending'"
    db.execute(
        f"DELETE FROM payloads WHERE trajectory_id IN (SELECT trajectory_id FROM trajectories WHERE {pending})",  # noqa: S608
        (r.group_id,),
    )
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
    db.execute(
        "UPDATE trajectories SET state = 'pending', step = NULL, lag = NULL WHERE state = 'trained' AND step >= ?",
        (r.step,),
    )
    db.execute(
        "UPDATE groups SET state = 'open', step = NULL "
        "WHERE state = 'assigned' OR (state = 'trained' AND step >= ?)",
        (r.step,),
    )
    db.execute(
        "UPDATE groups SET born_epoch = ?1, born_step = ?2 WHERE state = 'open' AND born_step > ?2",
        (r.epoch, r.step),
    )
    db.execute("DELETE FROM checkpoints WHERE step > ?", (r.step,))
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
    db.execute(
        "DELETE FROM payloads WHERE trajectory_id IN "
        "(SELECT trajectory_id FROM trajectories WHERE state = 'trained' AND step < ?)",
        (covered,),
    )


def _run_finished(db: _Transaction, r: RunFinished) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('finished', ?)", (str(r.step),))


def _move(db: _Transaction, count: int, before: TrajectoryState, after: TrajectoryState) -> None:
    db.add(f"state:{before}", -count)
    db.add(f"state:{after}", count)


def _event_logged(db: _Transaction, r: EventLogged) -> None:
    db.execute("INSERT INTO events (time, kind, message) VALUES (?, ?, ?)", (r.time, r.kind, r.message))


_WRITERS: dict[type, Callable[[_Transaction, Any], None]] = {
    SessionOpened: _session_opened,
    SessionClosed: _session_closed,
    GroupOpened: _group_opened,
    LeaseGranted: _lease_granted,
    LeaseEnded: _lease_ended,
    TrajectoryStored: _trajectory_stored,
    ItemsRefused: _items_refused,
    SequenceAdvanced: _sequence_advanced,
    GroupDropped: _group_dropped,
    VersionPublished: _version_published,
    BatchAssigned: _batch_assigned,
    BatchTrained: _batch_trained,
    LineageOpened: _lineage_opened,
    CheckpointWritten: _checkpoint_written,
    RunFinished: _run_finished,
    EventLogged: _event_logged,
}
