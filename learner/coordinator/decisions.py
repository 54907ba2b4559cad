"""What the scheduler answers, and what it asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from learner.coordinator.groups import Group
from learner.coordinator.records import TrajectoryState
from learner.coordinator.validation import RejectionCode
from penstock.errors import FaultKind


class History(Protocol):
    """What the scheduler asks of the ledger, about groups that it holds no more."""

    def trajectory_ids(self) -> Iterable[str]:
        """Those of evaluations included."""
        ...

    def was_granted(self, group_id: int, slot: int, attempt: int) -> bool: ...

    def was_evaluation_granted(self, number: int, slot: int, attempt: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """A trajectory's state, "duplicate", or a rejection with its code."""

    state: TrajectoryState | None
    code: RejectionCode | None = None
    message: str = ""

    @property
    def is_duplicate(self) -> bool:
        return self.state is None and self.code is None


PENDING = Verdict(TrajectoryState.PENDING)
DUPLICATE = Verdict(None)


@dataclass(frozen=True, slots=True)
class Revocation:
    session_id: str
    lease_id: str
    reason: str


@dataclass(frozen=True)
class Batch:
    step: int
    groups: tuple[Group, ...]

    @cached_property
    def group_ids(self) -> tuple[int, ...]:
        return tuple(group.group_id for group in self.groups)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why there is no batch, and the groups that would bring one nearer."""

    reason: str
    groups: tuple[Group, ...] = ()


@dataclass(slots=True)
class EnvironmentFaults:
    counts: Counter[FaultKind] = field(default_factory=Counter)
    last: str = ""
