"""Evaluations as the ledger remembers them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from learner.coordinator.evaluation.records import AnswerState, EvaluationState
from learner.coordinator.groups import LeaseOutcome
from penstock.scores import Answer
from penstock.trajectory import PolicyVersion

Rows = Callable[..., list[Any]]
"""Runs a query: SQL, and its parameters."""


@dataclass(slots=True, kw_only=True)
class RecoveredSlot:
    """What is known of one slot of an open evaluation."""

    next_attempt: int = 0
    answer: Answer | None = None
    faults: Counter[LeaseOutcome] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredEvaluation:
    number: int
    version: PolicyVersion
    digest: str
    plan: str
    slots: dict[int, RecoveredSlot]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredEvaluations:
    next_number: int = 1
    open: RecoveredEvaluation | None = None
    owed: bool = False
    """The last one came to nothing, and was to begin again."""
    measured: frozenset[tuple[str, str]] = frozenset()
    """(digest, plan) of every version that has a result."""
    results: tuple[str, ...] = ()
    """JSON of every result, oldest first."""


def recover(rows: Rows) -> RecoveredEvaluations:
    """rows: of the ledger."""
    evaluations = rows(
        "SELECT number, epoch, step, digest, plan, state, result FROM evaluations ORDER BY number"
    )
    still_open = [row for row in evaluations if row[5] == EvaluationState.OPEN]
    return RecoveredEvaluations(
        next_number=evaluations[-1][0] + 1 if evaluations else 1,
        open=_recover_open(rows, still_open[-1]) if still_open else None,
        owed=bool(evaluations) and evaluations[-1][5] == EvaluationState.VOID,
        measured=frozenset((row[3], row[4]) for row in evaluations if row[6] is not None),
        results=tuple(row[6] for row in evaluations if row[6] is not None),
    )


def was_granted(rows: Rows, number: int, slot: int, attempt: int) -> bool:
    sql = "SELECT 1 FROM evaluation_leases WHERE (number, slot, attempt) = (?, ?, ?)"
    return bool(rows(sql, (number, slot, attempt)))


def _recover_open(rows: Rows, row: tuple[Any, ...]) -> RecoveredEvaluation:
    number, epoch, step, digest, plan = row[:5]
    slots: dict[int, RecoveredSlot] = {}
    for slot, attempt, outcome, message in rows(
        "SELECT slot, attempt, outcome, message FROM evaluation_leases WHERE number = ? ORDER BY slot, attempt",
        (number,),
    ):
        known = slots.setdefault(slot, RecoveredSlot())
        known.next_attempt = attempt + 1
        if outcome is not None:
            known.faults[LeaseOutcome(outcome)] += 1
            known.messages += filter(None, [message])
    for slot, index, reward, num_sampled, truncated in rows(
        "SELECT slot, task_index, reward, num_sampled, truncated FROM evaluation_answers "
        "WHERE number = ? AND state = ?",
        (number, AnswerState.COUNTED),
    ):
        slots[slot].answer = Answer(
            prompt=index, reward=reward, num_tokens=num_sampled, truncated=bool(truncated)
        )
    return RecoveredEvaluation(
        number=number, version=PolicyVersion(epoch, step), digest=digest, plan=plan, slots=slots
    )
