"""What the ledger keeps of evaluations. Nothing of it counts among the trajectories that train."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from learner.coordinator.groups import LeaseOutcome
from penstock.trajectory import PolicyVersion, VersionSpan


class EvaluationState(StrEnum):
    OPEN = "open"
    COMPLETE = "complete"
    """Every slot was answered, or given up after its faults."""
    DEADLINE = "deadline"
    """Ended with the answers that there were."""
    VOID = "void"
    """Its version is gone: no result comes of it."""


class AnswerState(StrEnum):
    COUNTED = "counted"
    SURPLUS = "surplus"
    """Its slot was answered before, or its evaluation is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOpened:
    number: int
    version: PolicyVersion
    digest: str
    num_slots: int
    plan: str
    time: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationLeaseGranted:
    number: int
    slot: int
    attempt: int
    session_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationLeaseEnded:
    """A lease ended without an answer."""

    number: int
    slot: int
    attempt: int
    outcome: LeaseOutcome
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationAnswered:
    number: int
    slot: int
    attempt: int
    trajectory_id: str
    session_id: str
    sequence: int
    state: AnswerState
    environment: str
    task_index: int
    versions: tuple[VersionSpan, ...]
    num_sampled: int
    reward: float
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationEnded:
    number: int
    state: EvaluationState
    reason: str
    result: str | None
    """JSON of an EvaluationResult; None where there is none."""


EvaluationRecord = (
    EvaluationOpened | EvaluationLeaseGranted | EvaluationLeaseEnded | EvaluationAnswered | EvaluationEnded
)
