"""How each record changes the ledger's tables: one function a record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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
    TrajectoryStored,
    VersionPublished,
)


def apply(db: apsw.Connection, record: Record) -> None:
    """Writes one record, within the caller's transaction. Raises apsw.Error."""
    _WRITERS[type(record)](db, record)


def _session_opened(db: apsw.Connection, r: SessionOpened) -> None:
    db.execute(
        "INSERT INTO sessions (session_id, actor_id, number) VALUES (?, ?, ?)",
        (r.session_id, r.actor_id, r.number),
    )


def _session_closed(db: apsw.Connection, r: SessionClosed) -> None:
    db.execute("UPDATE sessions SET closed = ? WHERE session_id = ?", (r.reason, r.session_id))


def _group_opened(db: apsw.Connection, r: GroupOpened) -> None:
    task = r.task
    db.execute(
        "INSERT INTO groups (group_id, environment, split, task_index, seed, born_epoch, born_step, num_slots) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (r.group_id, task.environment, task.split, task.index, str(task.seed), *r.born, r.num_slots),
    )


def _lease_granted(db: apsw.Connection, r: LeaseGranted) -> None:
    db.execute(
        "INSERT INTO leases (lease_id, group_id, slot, attempt, session_id) VALUES (?, ?, ?, ?, ?)",
        (r.lease_id, r.group_id, r.slot, r.attempt, r.session_id),
    )


def _lease_ended(db: apsw.Connection, r: LeaseEnded) -> None:
    db.execute(
        "UPDATE leases SET outcome = ?, message = ? WHERE lease_id = ?", (r.outcome, r.message, r.lease_id)
    )


def _trajectory_stored(db: apsw.Connection, r: TrajectoryStored) -> None:
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
    _add(db, "accepted", 1)


def _items_refused(db: apsw.Connection, r: ItemsRefused) -> None:
    if r.duplicates:
        _add(db, "duplicate", r.duplicates)
    for code, count in Counter(r.rejected).items():
        _add(db, f"rejected:{code}", count)


def _sequence_advanced(db: apsw.Connection, r: SequenceAdvanced) -> None:
    db.execute("UPDATE sessions SET acknowledged = ? WHERE session_id = ?", (r.sequence, r.session_id))


def _group_dropped(db: apsw.Connection, r: GroupDropped) -> None:
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


def _version_published(db: apsw.Connection, r: VersionPublished) -> None:
    db.execute(
        "INSERT INTO versions (epoch, step, digest, manifest, metrics) VALUES (?, ?, ?, ?, ?)",
        (*r.version, r.digest, r.manifest, r.metrics),
    )


def _batch_assigned(db: apsw.Connection, r: BatchAssigned) -> None:
    for group_id in r.group_ids:
        db.execute("UPDATE groups SET state = 'assigned', step = ? WHERE group_id = ?", (r.step, group_id))


def _batch_trained(db: apsw.Connection, r: BatchTrained) -> None:
    for group_id in r.group_ids:
        db.execute("UPDATE groups SET state = 'trained', step = ? WHERE group_id = ?", (r.step, group_id))
        db.execute(
            "UPDATE trajectories SET state = 'trained', step = ?1, lag = max(0, ?1 - oldest_step) "
            "WHERE group_id = ?2 AND state = 'pending'",
            (r.step, group_id),
        )


def _lineage_opened(db: apsw.Connection, r: LineageOpened) -> None:
    db.execute("INSERT INTO lineages (epoch, step) VALUES (?, ?)", (r.epoch, r.step))
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


def _checkpoint_written(db: apsw.Connection, r: CheckpointWritten) -> None:
    db.execute(
        "INSERT OR REPLACE INTO checkpoints (epoch, step, path, digest) VALUES (?, ?, ?, ?)",
        (*r.version, r.path, r.digest),
    )
    kept = db.execute("SELECT step FROM checkpoints ORDER BY step DESC LIMIT ?", (r.keep,)).fetchall()
    covered = kept[-1][0] if len(kept) == r.keep else 0
    db.execute("DELETE FROM checkpoints WHERE step < ?", (covered,))
    db.execute(
        "DELETE FROM payloads WHERE trajectory_id IN "
        "(SELECT trajectory_id FROM trajectories WHERE state = 'trained' AND step < ?)",
        (covered,),
    )


def _run_finished(db: apsw.Connection, r: RunFinished) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES ('finished', ?)", (str(r.step),))


def _event_logged(db: apsw.Connection, r: EventLogged) -> None:
    db.execute("INSERT INTO events (time, kind, message) VALUES (?, ?, ?)", (r.time, r.kind, r.message))


def _add(db: apsw.Connection, name: str, value: int) -> None:
    db.execute(
        "INSERT INTO tallies VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        (name, value),
    )


_WRITERS: dict[type, Callable[[apsw.Connection, Any], None]] = {
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
