"""Slots that keep others waiting: rivals for slow rollouts, and an end for late groups. Pure.

A rollout is measured by its pace, not by its duration: a long one that writes as fast as
the others is never raced, since the winner of such a race would be the shorter answer,
and the batch's lengths would lean that way.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable

from learner.config import FleetConfig
from learner.coordinator.board import Board
from learner.coordinator.decisions import Waiting
from learner.coordinator.groups import Group
from learner.coordinator.journal import Journal
from learner.coordinator.leases import LiveLease
from learner.coordinator.records import TrajectoryState

_WINDOW = 256
_LEAST = 8


class Stragglers:
    """Looks once a tick for slots that may have a rival, and for groups past their deadline."""

    def __init__(self, *, fleet: FleetConfig, board: Board, journal: Journal) -> None:
        self._config = fleet
        self._board = board
        self._journal = journal
        self._pace = Pace()
        self._lease_ids: list[str] = []

    def finished(self, lease: LiveLease, environment: str, num_tokens: int, now: float) -> None:
        """Notes how long a rollout took, if that is known: not of a part that was played elsewhere, or before."""
        if lease.adopted or lease.continues is not None:
            return
        self._pace.finished(environment, now - lease.granted_at, num_tokens)

    def slot_for(
        self, session_id: str, born: int, may_lease: Callable[[str], bool]
    ) -> tuple[Group, int] | None:
        """A slot, of a group born at version `born` or before, whose only lease straggles elsewhere."""
        for lease_id in self._lease_ids:
            lease = self._board.leases.get(lease_id)
            group = None if lease is None else self._board.groups.get(lease.group_id)
            if lease is None or group is None or lease.session_id == session_id:
                continue
            alone = group.slots[lease.slot].lease_ids == [lease_id]
            sound = may_lease(group.task.environment) and not self._board.is_assigned(group)
            if alone and sound and group.born.step <= born:
                return group, lease.slot
        return None

    def tick(self, waiting: Waiting | None, now: float) -> None:
        """waiting: what the learner waits for; None while it trains."""
        for group in self._board.groups.values():
            if group.opened_at is None:
                group.opened_at = now
        waited_for = [
            group for group in (waiting.groups if waiting else ()) if group.group_id in self._board.groups
        ]
        for group in waited_for:
            age = 0.0 if group.opened_at is None else now - group.opened_at
            if age >= self._config.group_deadline_seconds and not group.is_ready:
                self._end_late(group, age)
        self._find(waited_for, now)

    def _end_late(self, group: Group, age: float) -> None:
        what = f"group {group.group_id} misses {group.num_missing} of {len(group.slots)} after {age:.0f} s"
        if self._config.late_group == "drop":
            self._board.drop(group, TrajectoryState.GROUP_DROPPED, f"{what}: late")
        elif self._config.late_group == "partial" and len(group.members) >= 2:
            self._journal.event("late", f"{what}: it is trained without them")
            self._board.train_without_missing(group, "its group is trained without it")
        elif not group.is_late:
            group.is_late = True
            self._journal.event("late", f"{what}: they may be leased again elsewhere")

    def _find(self, waited_for: list[Group], now: float) -> None:
        self._pace.refresh()
        all_leased = not any(slot.is_free for group in waited_for for slot in group.slots)
        blocking = {group.group_id for group in waited_for} if all_leased else set()
        self._lease_ids = [
            lease.lease_id
            for lease in self._board.leases
            if now - lease.granted_at > self._config.suspect_seconds
            and self._may_have_rival(lease, blocking, now)
        ]

    def _may_have_rival(self, lease: LiveLease, blocking: set[int], now: float) -> bool:
        """blocking: the groups that the learner waits for, if all that they miss is leased."""
        group = self._board.groups.get(lease.group_id)
        if group is None or group.slots[lease.slot].is_settled:
            return False
        factor = self._config.straggler_factor
        if group.group_id in blocking:
            factor /= 2
        usual = self._pace.usual_seconds(group.task.environment, lease.num_tokens)
        is_behind = factor > 0 and usual is not None and now - lease.granted_at > factor * usual
        return group.is_late or is_behind


class Pace:
    """Seconds a sampled token, and tokens a rollout, of the last finished rollouts by environment."""

    def __init__(self) -> None:
        self._finished: defaultdict[str, deque[tuple[float, int]]] = defaultdict(
            lambda: deque(maxlen=_WINDOW)
        )
        self._typical: dict[str, tuple[float, float]] = {}

    def finished(self, environment: str, seconds: float, num_tokens: int) -> None:
        self._finished[environment].append((seconds, num_tokens))

    def refresh(self) -> None:
        """Computes the medians anew. Call once for many `usual_seconds`."""
        self._typical = {
            environment: (
                statistics.median(seconds / num_tokens for seconds, num_tokens in finished),
                statistics.median(num_tokens for _, num_tokens in finished),
            )
            for environment, finished in self._finished.items()
            if len(finished) >= _LEAST
        }

    def usual_seconds(self, environment: str, num_tokens: int) -> float | None:
        """What a rollout usually takes that has come to `num_tokens`; None while too few are known."""
        typical = self._typical.get(environment)
        if typical is None:
            return None
        seconds_per_token, tokens = typical
        return seconds_per_token * max(num_tokens, tokens)
