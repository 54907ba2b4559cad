"""What the ledger keeps: one small value for each thing that happened.

The scheduler decides and returns records; the ledger writes them in order, many to a
commit. Nothing is answered to a peer before its records are on disk. Records of which there is
one for each trajectory are tuples, which are made five times as fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from learner.coordinator.evaluation.records import EvaluationRecord
from learner.coordinator.groups import LeaseOutcome
from penstock.trajectory import PolicyVersion, Task


class TrajectoryState(StrEnum):
    """Where an accepted trajectory stands. Exactly one, always."""

    PENDING = "pending"
    TRAINED = "trained"
    STALE = "stale"
    SURPLUS = "surplus"
    GROUP_DROPPED = "group_dropped"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened:
    session_id: str
    actor_id: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClosed:
    session_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOpened:
    group_id: int
    task: Task
    born: PolicyVersion
    num_slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseGranted:
    group_id: int
    slot: int
    attempt: int
    session_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialStored:
    """A leaving actor handed over what it had played of a slot."""

    group_id: int
    slot: int
    payload: bytes
    checksum: int
    newest: PolicyVersion
    num_tokens: int


class LeaseEnded(NamedTuple):
    """A lease ended without a trajectory: one that comes under it ends it by itself."""

    group_id: int
    slot: int
    attempt: int
    outcome: LeaseOutcome
    message: str = ""


class TrajectoryStored(NamedTuple):
    """Also tells that its session came to `sequence`."""

    trajectory_id: str
    group_id: int
    slot: int
    attempt: int
    """Of the lease that it came under."""
    session_id: str
    sequence: int
    state: TrajectoryState
    environment: str
    oldest_step: int
    num_sampled: int
    mixed: bool
    reward: float
    observation_digest: str
    payload: bytes | None
    """The trajectory as it was sent; None where it will never be trained on."""
    checksum: int
    """Of the payload, as its actor made it: 64 bits, unsigned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemsRefused:
    """Items of a session that left no trajectory."""

    duplicates: int = 0
    rejected: tuple[str, ...] = ()
    """A rejection code for each."""


class SequenceAdvanced(NamedTuple):
    """An item that left no trajectory was decided upon."""

    session_id: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDropped:
    """The group's pending trajectories end in `state`."""

    group_id: int
    state: TrajectoryState
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPublished:
    version: PolicyVersion
    digest: str
    manifest: bytes
    metrics: str
    """JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAssigned:
    """The trainer is given these groups for `step`: it gets no others for it, whoever dies meanwhile."""

    step: int
    group_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTrained:
    """The groups of one step: their pending trajectories are trained."""

    step: int
    group_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageOpened:
    """A trainer starts from checkpoint `step`.

    What was trained from there on is pending again, and groups that were born from there on
    are born again.
    """

    epoch: int
    step: int
    max_lag: int
    reborn: tuple[tuple[int, PolicyVersion], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWritten:
    version: PolicyVersion
    path: str
    digest: str
    keep: int
    """Checkpoints that are kept, this one included."""
    keep_payloads: bool = False
    """Keep payloads although every kept checkpoint covers the step that trained on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseSet:
    """An operator paused the run, or resumed it: it stays so until the next time."""

    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLogged:
    kind: str
    message: str
    time: float
    """Seconds since 1970."""


Record = (
    SessionOpened
    | SessionClosed
    | GroupOpened
    | LeaseGranted
    | PartialStored
    | LeaseEnded
    | TrajectoryStored
    | ItemsRefused
    | SequenceAdvanced
    | GroupDropped
    | VersionPublished
    | BatchAssigned
    | BatchTrained
    | LineageOpened
    | CheckpointWritten
    | RunFinished
    | PauseSet
    | EventLogged
    | EvaluationRecord
)
