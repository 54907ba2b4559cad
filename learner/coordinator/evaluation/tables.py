"""How records of evaluations change the ledger's tables: one function a kind of record."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from learner.coordinator.evaluation.records import (
    EvaluationAnswered,
    EvaluationEnded,
    EvaluationLeaseEnded,
    EvaluationLeaseGranted,
    EvaluationOpened,
)


class Transaction(Protocol):
    """The commit that the records are written in."""

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> object: ...

    def execute_many(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None: ...


def _opened(db: Transaction, r: EvaluationOpened) -> None:
    db.execute(
        "INSERT INTO evaluations (number, epoch, step, digest, num_slots, plan, time) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (r.number, *r.version, r.digest, r.num_slots, r.plan, r.time),
    )


def _ended(db: Transaction, r: EvaluationEnded) -> None:
    db.execute(
        "UPDATE evaluations SET state = ?, reason = ?, result = ? WHERE number = ?",
        (r.state, r.reason, r.result, r.number),
    )


def _leases_granted(db: Transaction, records: Sequence[EvaluationLeaseGranted]) -> None:
    rows = [(r.number, r.slot, r.attempt, r.session_id) for r in records]
    db.execute_many("INSERT INTO evaluation_leases (number, slot, attempt, session_id) VALUES {}", rows)


def _answered(db: Transaction, records: Sequence[EvaluationAnswered]) -> None:
    db.execute_many(
        "INSERT INTO evaluation_answers (trajectory_id, number, slot, attempt, session_id, sequence, state, "
        "environment, task_index, versions, num_sampled, reward, truncated) VALUES {}",
        [
            (
                r.trajectory_id, r.number, r.slot, r.attempt, r.session_id, r.sequence, r.state, r.environment,
                r.task_index, json.dumps([[*span.version, span.num_tokens] for span in r.versions]), r.num_sampled,
                r.reward, r.truncated,
            )
            for r in records
        ],
    )  # fmt: skip


def _leases_ended(db: Transaction, records: Sequence[EvaluationLeaseEnded]) -> None:
    for r in records:
        db.execute(
            "UPDATE evaluation_leases SET outcome = ?, message = ? WHERE (number, slot, attempt) = (?, ?, ?)",
            (r.outcome, r.message, r.number, r.slot, r.attempt),
        )


GATHERED: dict[type, Callable[[Any, Any], None]] = {
    EvaluationLeaseGranted: _leases_granted,
    EvaluationAnswered: _answered,
    EvaluationLeaseEnded: _leases_ended,
}
"""Written many at a time, in this order: a row is added before it is changed."""

SINGLY: dict[type, Callable[[Any, Any], None]] = {EvaluationOpened: _opened, EvaluationEnded: _ended}
