"""Groups and their slots: what is leased, filled, or given up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from penstock.trajectory import PolicyVersion, Task


class LeaseOutcome(StrEnum):
    """How a lease ended."""

    FILLED = "filled"
    EXPIRED = "expired"
    """No progress until the deadline."""
    DEAD = "dead"
    """Its actor's session died."""
    DRAINED = "drained"
    INFRASTRUCTURE = "infrastructure"
    DATA = "data"
    ENGINE = "engine"
    """Its actor's engine failed."""
    REVOKED = "revoked"


class Filled(NamedTuple):
    """What training needs to know of the trajectory in a slot, besides its payload."""

    trajectory_id: str
    oldest_step: int
    """Step of the oldest version among its tokens."""
    num_sampled: int
    mixed: bool
    reward: float
    observation_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """A partial rollout, in the ledger, that the slot's next lease may go on from."""

    newest: PolicyVersion
    """Only an actor with this version or a newer one may: versions never run backwards."""
    num_bytes: int
    num_tokens: int
    """Sampled so far."""


@dataclass(slots=True, kw_only=True)
class Slot:
    """One of a group's places. It is leased until a trajectory fills it or it is given up."""

    next_attempt: int = 0
    lease_ids: list[str] = field(default_factory=list)
    """Live leases: none, one, or a straggler and its rival. Ended ones may still fill the slot."""
    filled: Filled | None = None
    handed_over: HandedOver | None = None
    given_up: bool = False
    faults: Counter[LeaseOutcome] = field(default_factory=Counter)

    @property
    def is_free(self) -> bool:
        return self.filled is None and not self.lease_ids and not self.given_up

    @property
    def is_settled(self) -> bool:
        return self.filled is not None or self.given_up


@dataclass(slots=True, kw_only=True)
class Group:
    """The siblings of one prompt."""

    group_id: int
    task: Task
    born: PolicyVersion
    due: int
    """The last step on which the group may be trained."""
    slots: list[Slot]
    opened_at: float | None = None
    """Monotonic seconds of the first tick that saw it; after a restart the count starts anew."""
    is_late: bool = False
    """It kept the learner waiting past the deadline: every missing slot may have a rival."""
    is_quarantined: bool = False
    """Closed because of what its task or its trajectories did: what comes late is set aside with them."""
    deaths: set[str] = field(default_factory=set)
    """Sessions that died while they held one of its leases."""

    @property
    def is_settled(self) -> bool:
        for slot in self.slots:  # noqa: SIM110 - a generator would cost a microsecond for each trajectory
            if slot.filled is None and not slot.given_up:
                return False
        return True

    @property
    def members(self) -> list[Filled]:
        return [slot.filled for slot in self.slots if slot.filled is not None]

    @property
    def is_ready(self) -> bool:
        """Trainable: every slot is settled, and a baseline can be computed."""
        return self.is_settled and len(self.members) >= 2

    @property
    def num_missing(self) -> int:
        return len(self.missing_slots)

    @property
    def observation_digest(self) -> str | None:
        for slot in self.slots:
            if slot.filled is not None:
                return slot.filled.observation_digest
        return None

    @property
    def missing_slots(self) -> list[Slot]:
        return [slot for slot in self.slots if not slot.is_settled]

    @property
    def num_free(self) -> int:
        return sum(slot.is_free for slot in self.slots)

    @property
    def first_free(self) -> int | None:
        """Asked for each lease, and so written out."""
        for number, slot in enumerate(self.slots):
            if slot.filled is None and not slot.lease_ids and not slot.given_up:
                return number
        return None
