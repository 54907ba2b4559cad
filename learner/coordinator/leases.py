"""Live leases and their deadlines. Pure: the clock's reading is passed in."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from learner.coordinator.groups import HandedOver


def lease_name(group_id: int, slot: int, attempt: int) -> str:
    """What a lease is called on the wire."""
    return f"{group_id}.{slot}.{attempt}"


def parse_lease_name(lease_id: str) -> tuple[int, int, int] | None:
    """(group_id, slot, attempt); None if no lease was ever called so."""
    parts = lease_id.split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts):
        return None
    group_id, slot, attempt = map(int, parts)
    return group_id, slot, attempt


@dataclass(slots=True, kw_only=True)
class LiveLease:
    lease_id: str
    group_id: int
    slot: int
    attempt: int
    session_id: str
    granted_at: float
    deadline: float
    """Monotonic seconds."""
    num_tokens: int = 0
    num_turns: int = 0
    progress_at: float = 0.0
    adopted: bool = False
    """Its actor joined again with it: `granted_at` is of that, and says nothing of its rollout's beginning."""
    continues: HandedOver | None = None
    """The partial rollout, in the ledger, that it went on from."""
    environment_seconds: float = 0.0
    """For how long it has waited for its environment, as its actor told last; 0 if it does not."""

    @property
    def place(self) -> tuple[int, int, int]:
        return self.group_id, self.slot, self.attempt


class RolloutReport(NamedTuple):
    """What an actor tells of one lease with each heartbeat."""

    lease_id: str
    num_tokens: int
    num_turns: int
    environment_seconds: float = 0.0
    """For how long it waits for its environment now."""


class LeaseTable:
    """Leases that are live. A lease is extended by progress, never by a heartbeat alone."""

    def __init__(self, *, progress_timeout: float, name: Callable[[int, int, int], str] = lease_name) -> None:
        """name: what the lease of a group, slot and attempt is called on the wire."""
        self._progress_timeout = progress_timeout
        self._name = name
        self._leases: dict[str, LiveLease] = {}
        self._waiting: dict[str, LiveLease] = {}
        """Those whose rollout waits for its environment."""
        self._none_expires_before = -math.inf
        """Deadlines only move on, and those of new leases come after those of older ones."""
        self._by_session: defaultdict[str, set[str]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[LiveLease]:
        """Oldest grant first."""
        return iter(self._leases.values())

    def get(self, lease_id: str) -> LiveLease | None:
        return self._leases.get(lease_id)

    def waiting(self) -> Iterator[LiveLease]:
        """Whose rollouts wait for their environments, as their actors told last."""
        return iter(self._waiting.values())

    def of_session(self, session_id: str) -> list[LiveLease]:
        return [self._leases[lease_id] for lease_id in sorted(self._by_session.get(session_id, ()))]

    def grant(self, *, group_id: int, slot: int, attempt: int, session_id: str, now: float) -> LiveLease:
        lease_id = self._name(group_id, slot, attempt)
        lease = LiveLease(
            lease_id=lease_id,
            group_id=group_id,
            slot=slot,
            attempt=attempt,
            session_id=session_id,
            granted_at=now,
            deadline=now + self._progress_timeout,
            progress_at=now,
        )
        self._leases[lease_id] = lease
        self._by_session[session_id].add(lease_id)
        return lease

    def end(self, lease_id: str) -> LiveLease | None:
        """Removes a lease; None if it was not live."""
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            self._waiting.pop(lease_id, None)
            self._forget(lease)
        return lease

    def adopt(self, lease_id: str, session_id: str, now: float) -> bool:
        """Moves a live lease to a newer session of its actor. False if it is not live."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        self._forget(lease)
        lease.session_id = session_id
        lease.granted_at, lease.adopted = now, True
        lease.deadline = now + self._progress_timeout
        self._by_session[session_id].add(lease_id)
        return True

    def progress(self, report: RolloutReport, session_id: str, now: float) -> None:
        """Extends a lease if its rollout has more tokens or turns than it had."""
        lease = self._leases.get(report.lease_id)
        if lease is None or lease.session_id != session_id:
            return
        lease.environment_seconds = report.environment_seconds
        if report.environment_seconds > 0:
            self._waiting[lease.lease_id] = lease
        else:
            self._waiting.pop(lease.lease_id, None)
        if report.num_tokens > lease.num_tokens or report.num_turns > lease.num_turns:
            lease.num_tokens = max(report.num_tokens, lease.num_tokens)
            lease.num_turns = max(report.num_turns, lease.num_turns)
            lease.progress_at = now
            lease.deadline = now + self._progress_timeout

    def expired(self, now: float) -> list[LiveLease]:
        if now < self._none_expires_before:
            return []
        expired = [lease for lease in self._leases.values() if lease.deadline <= now]
        if not expired:
            earliest = min((lease.deadline for lease in self._leases.values()), default=math.inf)
            self._none_expires_before = min(earliest, now + self._progress_timeout)
        return expired

    def shift(self, seconds: float) -> None:
        """Moves every deadline, after a pause of the learner itself."""
        for lease in self._leases.values():
            lease.deadline += seconds

    def _forget(self, lease: LiveLease) -> None:
        held = self._by_session[lease.session_id]
        held.discard(lease.lease_id)
        if not held:
            del self._by_session[lease.session_id]
