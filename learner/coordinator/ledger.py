"""The ledger: one SQLite database, segments of payloads beside it, one writer, many records to a commit.

`write` returns once its payloads are synced and, after them, its records committed and
synced (WAL, synchronous=FULL). All records that wait while one commit runs go into the
next, so the cost of a sync is shared without a timer. A failed write or sync is fatal:
nothing is acknowledged any more, and the process must exit and replay (a retried fsync
says OK for lost pages).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from learner.coordinator import database, segments, tables
from learner.coordinator.evaluation import history as evaluation_history
from learner.coordinator.evaluation.history import RecoveredEvaluations
from learner.coordinator.groups import Filled, Group, HandedOver, LeaseOutcome, Slot
from learner.coordinator.records import Record, TrajectoryState
from learner.coordinator.segments import SegmentWriter
from penstock.errors import LedgerError
from penstock.trajectory import PolicyVersion, Task

_log = logging.getLogger(__name__)

_PLACES = "SELECT trajectory_id, segment, offset, num_bytes, checksum FROM trajectories"


class CannotOpen(LedgerError):
    """The file cannot be opened just now, as where a process has no descriptor left: it need not be damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the ledger counts. `imbalance` is 0, or something was lost."""

    accepted: int = 0
    by_state: dict[TrajectoryState, int] = field(default_factory=dict)
    duplicates: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    max_lag_trained: int = 0
    mixed_version_trained: int = 0
    tokens_trained: int = 0
    handed_over: int = 0
    """Partial rollouts of leaving actors."""
    by_environment: dict[str, int] = field(default_factory=dict)

    @property
    def imbalance(self) -> int:
        return self.accepted - sum(self.by_state.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What a coordinator needs to go on with a run."""

    run_id: str
    epoch: int
    """Of the newest lineage; 0 if no trainer ever started."""
    from_step: int
    """Of the checkpoint that the newest lineage started from."""
    num_sessions: int
    next_group_id: int
    open_groups: tuple[Group, ...]
    """Assigned ones included."""
    assigned: tuple[int, ...]
    """Groups of the batch that the trainer had been given."""
    live_leases: tuple[tuple[int, int, int], ...]
    """(group_id, slot, attempt) of leases that had not ended."""
    versions: dict[PolicyVersion, str]
    """Digest of every version ever published."""
    finished: bool
    paused: bool
    """By an operator, who has not resumed it since."""
    newest: PublishedVersion | None
    """The newest of the newest lineage."""
    evaluations: RecoveredEvaluations = field(default_factory=RecoveredEvaluations)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedVersion:
    """A version as it was journaled."""

    version: PolicyVersion
    manifest: bytes
    metrics: str


def read_totals(db: apsw.Connection) -> Totals:
    """Reads the tallies, which every commit brings up to date. Raises apsw.Error."""
    tallies = dict(db.execute("SELECT name, value FROM tallies"))

    def of(kind: str) -> dict[str, int]:
        return {name.removeprefix(kind): n for name, n in tallies.items() if name.startswith(kind) and n}

    return Totals(
        accepted=tallies.get("accepted", 0),
        by_state={TrajectoryState(state): count for state, count in of("state:").items()},
        duplicates=tallies.get("duplicate", 0),
        rejected=of("rejected:"),
        max_lag_trained=tallies.get("lag_trained", 0),
        mixed_version_trained=tallies.get("mixed_trained", 0),
        tokens_trained=tallies.get("tokens_trained", 0),
        handed_over=tallies.get("handed_over", 0),
        by_environment=of("environment:"),
    )


class Ledger:
    """Opens, or creates, the ledger of a run folder. Raises ConfigError, LedgerError."""

    def __init__(
        self,
        path: Path,
        *,
        on_fatal: Callable[[LedgerError], None] = lambda _: None,
        segment_bytes: int = segments.SEGMENT_BYTES,
    ) -> None:
        self.path = path
        self._on_fatal = on_fatal
        self._lock_file = database.lock(path)
        self._failed: LedgerError | None = None
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._db = database.open_writer(path)
        self._reader = database.open_reader(path)
        self._recount()
        self._segments = self._open_segments(segment_bytes)
        self._writer = threading.Thread(target=self._write_forever, name="ledger-writer", daemon=True)
        self._writer.start()

    async def write(self, records: Sequence[Record]) -> None:
        """Returns once the records, and all written before them, are on disk. Raises LedgerError."""
        await self.begin_write(records)

    def begin_write(self, records: Sequence[Record]) -> asyncio.Future[None]:
        """`write`, without waiting: the future is done once the records are on disk."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def done(error: LedgerError | None) -> None:
            loop.call_soon_threadsafe(_settle, future, error)

        self._queue.put(_Write(tuple(records), done))
        return future

    def write_blocking(self, records: Sequence[Record], *, timeout_seconds: float = 60.0) -> None:
        """`write` for callers without an event loop."""
        done: queue.SimpleQueue[LedgerError | None] = queue.SimpleQueue()
        self._queue.put(_Write(tuple(records), done.put))
        error = done.get(timeout=timeout_seconds)
        if error is not None:
            raise error

    def close(self) -> None:
        """Writes what is queued, then closes. May be called twice."""
        if self._lock_file.closed:
            return
        self._queue.put(None)
        self._writer.join(timeout=30.0)
        self._reader.close()
        self._db.close()
        self._segments.close()
        self._lock_file.close()

    # -- reading ------------------------------------------------------------------------

    def recover(self) -> Recovered:
        """Reads the state to go on from."""
        meta = dict(self._rows("SELECT name, value FROM meta"))
        (num_sessions,) = self._row("SELECT coalesce(max(number), 0) FROM sessions")
        (next_group_id,) = self._row("SELECT coalesce(max(group_id) + 1, 0) FROM groups")
        live = self._rows(
            "SELECT group_id, slot, attempt FROM leases WHERE outcome IS NULL "
            "AND group_id IN (SELECT group_id FROM groups WHERE state IN ('open', 'assigned'))"
        )
        epoch, from_step = self._row("SELECT coalesce(max(epoch), 0), coalesce(step, 0) FROM lineages")
        assigned = self._rows("SELECT group_id FROM groups WHERE state = 'assigned' ORDER BY group_id")
        versions = self._rows("SELECT epoch, step, digest FROM versions")
        return Recovered(
            run_id=meta["run_id"],
            epoch=epoch,
            from_step=from_step,
            num_sessions=num_sessions,
            next_group_id=next_group_id,
            open_groups=tuple(self._groups("state IN ('open', 'assigned')", ())),
            assigned=tuple(group_id for (group_id,) in assigned),
            live_leases=tuple((row[0], row[1], row[2]) for row in live),
            versions={PolicyVersion(epoch, step): digest for epoch, step, digest in versions},
            finished="finished" in meta,
            paused="paused" in meta,
            newest=self._newest_version(epoch),
            evaluations=evaluation_history.recover(self._rows),
        )

    def _newest_version(self, epoch: int) -> PublishedVersion | None:
        rows = self._rows(
            "SELECT step, manifest, metrics FROM versions WHERE epoch = ? ORDER BY step DESC LIMIT 1",
            (epoch,),
        )
        if not rows:
            return None
        step, manifest, metrics = rows[0]
        return PublishedVersion(version=PolicyVersion(epoch, step), manifest=manifest, metrics=metrics)

    def groups_trained_from(self, step: int) -> list[Group]:
        """Groups that steps >= `step` trained, as they were just before: complete and pending."""
        return list(self._groups("state = 'trained' AND step >= ?", (step,)))

    def totals(self) -> Totals:
        """What the ledger counts, over a connection of its own: safe in any thread. Raises CannotOpen, LedgerError."""
        try:
            with contextlib.closing(database.open_reader(self.path)) as db:
                return read_totals(db)
        except apsw.CantOpenError as error:
            raise CannotOpen(f"{self.path}: {database.explain(error)}") from error
        except apsw.Error as error:
            raise LedgerError(f"{self.path}: cannot be read: {database.explain(error)}") from error

    def _recount(self) -> None:
        """Counts the rows once: what the tallies say of them must be true, whatever wrote them."""
        try:
            with self._db:
                before = read_totals(self._db)
                tables.recount(self._db)
                after = read_totals(self._db)
        except apsw.Error as error:
            raise LedgerError(f"{self.path}: cannot be written: {database.explain(error)}") from error
        if before != after:
            _log.error("%s: the tallies said %s; the rows say %s", self.path, before, after)

    def _open_segments(self, segment_bytes: int) -> SegmentWriter:
        """Begins where the ledger's rows end; what is to be trained must be there. Raises LedgerError."""
        kept = [number for (number,) in self._rows("SELECT number FROM segments")]
        pending = self._rows(
            f"{_PLACES} WHERE state = 'pending' AND segment IS NOT NULL ORDER BY segment, offset"
        )
        for row, payload in zip(pending, self._read(pending), strict=True):
            if payload is None:
                raise self._damaged(row[0])
        try:
            return SegmentWriter(segments.folder_of(self.path), kept, segment_bytes=segment_bytes)
        except OSError as error:
            raise LedgerError(f"{self.path.parent} cannot be written: {error}") from error

    def payloads(self, group_id: int, trajectory_ids: Iterable[str]) -> list[bytes]:
        """Trajectories of a group as they were sent, in the order asked for. Raises LedgerError."""
        rows = {row[0]: row for row in self._rows(f"{_PLACES} WHERE group_id = ?", (group_id,))}
        wanted = [rows[trajectory_id] for trajectory_id in trajectory_ids]
        for trajectory_id, segment, *_ in wanted:
            if segment is None:
                raise self._fatal(
                    f"{self.path}: trajectory {trajectory_id} is to be trained, but its payload was deleted, since "
                    "every checkpoint covered it. Bring a newer checkpoint back, or start a new run from this one"
                )
        payloads = []
        for row, payload in zip(wanted, self._read(wanted), strict=True):
            if payload is None:
                raise self._damaged(row[0])
            payloads.append(payload)
        return payloads

    def _read(self, rows: Iterable[Any]) -> Iterator[bytes | None]:
        try:
            yield from segments.read(segments.folder_of(self.path), tables.places(row[1:] for row in rows))
        except OSError as error:
            raise self._fatal(f"{self.path.parent}: payloads cannot be read: {error}") from error

    def _damaged(self, trajectory_id: str) -> LedgerError:
        return self._fatal(
            f"{segments.folder_of(self.path)}: the payload of trajectory {trajectory_id} is not what was written: its "
            "checksum differs from its actor's. It was changed on the disk, and must not be trained on"
        )

    def newest_checkpoint(self) -> int:
        """The step of the newest checkpoint that was recorded; 0 if there is none."""
        step: int = self._row("SELECT coalesce(max(step), 0) FROM checkpoints")[0]
        return step

    def partial(self, group_id: int, slot: int) -> tuple[bytes, int] | None:
        """What was handed over of an open group's slot, and its checksum."""
        rows = self._rows(
            "SELECT payload, checksum FROM partials WHERE group_id = ? AND slot = ?", (group_id, slot)
        )
        return (rows[0][0], tables.unsigned(rows[0][1])) if rows else None

    def trajectory_ids(self) -> Iterator[str]:
        """Of every trajectory ever stored, and of every answer to an evaluation."""
        sql = "SELECT trajectory_id FROM trajectories UNION ALL SELECT trajectory_id FROM evaluation_answers"
        try:
            for (name,) in self._reader.execute(sql):
                yield name
        except apsw.Error as error:
            raise self._fatal(f"{self.path}: cannot be read: {database.explain(error)}") from error

    def was_granted(self, group_id: int, slot: int, attempt: int) -> bool:
        """Whether there ever was such a lease."""
        sql = "SELECT 1 FROM leases WHERE (group_id, slot, attempt) = (?, ?, ?)"
        return bool(self._rows(sql, (group_id, slot, attempt)))

    def was_evaluation_granted(self, number: int, slot: int, attempt: int) -> bool:
        return evaluation_history.was_granted(self._rows, number, slot, attempt)

    def events_after(self, sequence: int, limit: int = 1000) -> list[tuple[int, float, str, str]]:
        return self._rows(
            "SELECT sequence, time, kind, message FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?",
            (sequence, limit),
        )

    def _groups(self, condition: str, parameters: tuple[Any, ...]) -> Iterator[Group]:
        rows = self._rows(
            "SELECT group_id, environment, split, task_index, seed, born_epoch, born_step, num_slots "  # noqa: S608
            f"FROM groups WHERE {condition} ORDER BY group_id",
            parameters,
        )
        for group_id, environment, split, index, seed, epoch, step, num_slots in rows:
            group = Group(
                group_id=group_id,
                task=Task(environment, split, index, int(seed)),
                born=PolicyVersion(epoch, step),
                due=step,
                slots=[Slot() for _ in range(num_slots)],
            )
            self._fill(group)
            yield group

    def _fill(self, group: Group) -> None:
        for slot, attempt, outcome, session_id in self._rows(
            "SELECT slot, attempt, outcome, session_id FROM leases WHERE group_id = ?", (group.group_id,)
        ):
            held = group.slots[slot]
            held.next_attempt = max(held.next_attempt, attempt + 1)
            if outcome == LeaseOutcome.DEAD:
                group.deaths.add(session_id)
            elif outcome is not None:
                held.faults[LeaseOutcome(outcome)] += 1
        for slot, epoch, step, num_tokens, num_bytes in self._rows(
            "SELECT slot, newest_epoch, newest_step, num_tokens, length(payload) FROM partials WHERE group_id = ?",
            (group.group_id,),
        ):
            group.slots[slot].handed_over = HandedOver(
                newest=PolicyVersion(epoch, step), num_bytes=num_bytes, num_tokens=num_tokens
            )
        for row in self._rows(
            "SELECT trajectory_id, slot, oldest_step, num_sampled, mixed, reward, observation_digest "
            "FROM trajectories WHERE group_id = ? AND state IN (?, ?)",
            (group.group_id, TrajectoryState.PENDING, TrajectoryState.TRAINED),
        ):
            trajectory_id, slot, oldest_step, num_sampled, mixed, reward, digest = row
            group.slots[slot].filled = Filled(
                trajectory_id=trajectory_id,
                oldest_step=oldest_step,
                num_sampled=num_sampled,
                mixed=bool(mixed),
                reward=reward,
                observation_digest=digest,
            )

    def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._reader.execute(sql, parameters).fetchall()
        except apsw.Error as error:
            raise self._fatal(f"{self.path}: cannot be read: {database.explain(error)}") from error

    def _fatal(self, message: str) -> LedgerError:
        """Ends the ledger's life, and the process's: what it would give out cannot be trusted."""
        if self._failed is None:
            self._failed = LedgerError(message)
            _log.critical("%s", self._failed)
            self._on_fatal(self._failed)
        return self._failed

    def _row(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        return self._rows(sql, parameters)[0]

    # -- writing ------------------------------------------------------------------------

    def _write_forever(self) -> None:
        while True:
            batch, closing = self._next_batch()
            error = self._commit(batch)
            for write in batch:
                write.done(error)
            if closing:
                return

    def _next_batch(self) -> tuple[list[_Write], bool]:
        """Blocks for one write, then takes all that wait; True once the ledger is closing."""
        batch: list[_Write] = []
        write = self._queue.get()
        while write is not None:
            batch.append(write)
            try:
                write = self._queue.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _commit(self, batch: list[_Write]) -> LedgerError | None:
        if self._failed is not None:
            return self._failed
        try:
            with self._db:
                records = (record for write in batch for record in write.records)
                gone = tables.apply(self._db, records, self._segments)
                self._segments.sync()
            self._segments.delete(gone)
        except Exception as error:  # noqa: BLE001 - a writer that died of it would leave every commit waiting
            return self._fatal(
                f"{self.path}: a commit failed, nothing more is acknowledged: {database.explain(error)}"
            )
        return None


@dataclass(frozen=True, slots=True)
class _Write:
    records: tuple[Record, ...]
    done: Callable[[LedgerError | None], None]


def _settle(future: asyncio.Future[None], error: LedgerError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
