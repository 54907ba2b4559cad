"""Environments that fail or stand still are left out, so that the others go on. Pure.

Each environment has a breaker. While one is open, nothing of it is leased, its groups hold
no place within the lag bound, and new groups are drawn from the others only.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from learner.config import BreakerConfig
from learner.coordinator.board import Board
from learner.coordinator.breaker import Breaker, BreakerState
from learner.coordinator.decisions import EnvironmentFaults
from learner.coordinator.groups import Group
from learner.coordinator.journal import Journal
from learner.coordinator.leases import LiveLease
from learner.coordinator.records import TrajectoryState
from penstock.errors import FaultKind


@dataclass(slots=True, kw_only=True)
class Watched:
    """One environment, as the run has seen it since the coordinator started."""

    breaker: Breaker
    faults: EnvironmentFaults = field(default_factory=EnvironmentFaults)
    num_groups_cut: int = 0
    """Dropped, or trained without what they missed, because it was left out."""


class Outages:
    """Judges environments, and ends what those hold that are left out."""

    def __init__(
        self, *, environments: Sequence[str], config: BreakerConfig, board: Board, journal: Journal
    ) -> None:
        self.environments = {name: Watched(breaker=Breaker(config)) for name in environments}
        self._config = config
        self._board = board
        self._journal = journal

    def may_lease(self, environment: str) -> bool:
        return self._of(environment).breaker.may_lease

    def left_out(self) -> list[str]:
        """Environments that may not be leased now."""
        return [name for name, watched in self.environments.items() if not watched.breaker.may_lease]

    def leased(self, environment: str, lease_id: str) -> None:
        self._of(environment).breaker.leased(lease_id)

    def answered(self, environment: str, num_answers: int, seconds: float) -> None:
        """Calls of one actor were answered."""
        self._of(environment).breaker.answered(num_answers, seconds)

    def filled(self, environment: str, lease_id: str, now: float) -> None:
        """A rollout came to its end."""
        self._judge(environment, lease_id, "", now)

    def fault(self, environment: str, lease_id: str, kind: FaultKind, message: str, now: float) -> None:
        """A rollout failed. What its task is at fault for says nothing of the environment."""
        faults = self._of(environment).faults
        faults.counts[kind] += 1
        faults.last = message[:500]
        self._journal.event("fault", f"{kind} fault on lease {lease_id} ({environment}): {message[:500]}")
        if kind is FaultKind.INFRASTRUCTURE:
            self._judge(environment, lease_id, message[:200], now)

    def expired(self, lease: LiveLease, now: float) -> None:
        """A lease came to no progress for too long, perhaps because its environment did not answer."""
        group = self._board.find(lease.group_id)
        if group is not None and lease.environment_seconds > 0:
            self._judge(group.task.environment, lease.lease_id, "no answer until the lease expired", now)

    def tick(self, now: float) -> None:
        waits: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for lease in self._board.leases.waiting():
            environment = self._environment_of(lease)
            if environment is not None:
                waits[environment][lease.lease_id] = lease.environment_seconds
        for name, watched in self.environments.items():
            others_go_on = any(
                other.breaker.state is BreakerState.CLOSED
                for other in self.environments.values()
                if other is not watched
            )
            rollouts = functools.partial(self._rollouts, name)
            self._tell(name, watched.breaker.look(waits[name], rollouts, others_go_on=others_go_on, now=now))
            if watched.breaker.state is BreakerState.OPEN:
                # Also those that a trainer's new lineage brought back.
                self._cut(name)

    def _environment_of(self, lease: LiveLease) -> str | None:
        group = self._board.groups.get(lease.group_id)
        return None if group is None else group.task.environment

    def _rollouts(self, environment: str) -> set[str]:
        return {lease.lease_id for lease in self._board.leases if self._environment_of(lease) == environment}

    def _of(self, environment: str) -> Watched:
        """Of any that a group names: a run may have been started again with other environments."""
        if environment not in self.environments:
            self.environments[environment] = Watched(breaker=Breaker(self._config))
        return self.environments[environment]

    def _judge(self, environment: str, lease_id: str, failure: str, now: float) -> None:
        state = self._of(environment).breaker.rollout_ended(lease_id, failure=failure, now=now)
        self._tell(environment, state)
        if state is BreakerState.OPEN:
            self._cut(environment)

    def _tell(self, environment: str, state: BreakerState | None) -> None:
        if state is BreakerState.OPEN:
            reason = self._of(environment).breaker.reason
            self._journal.event("left_out", f"environment {environment} is left out: {reason}")
        elif state is BreakerState.PROBING:
            self._journal.event("probing", f"environment {environment} is tried again")
        elif state is BreakerState.CLOSED:
            self._journal.event("back", f"environment {environment} answers again, and is leased as before")

    def _cut(self, environment: str) -> None:
        """Ends the groups that wait for an environment that is left out."""
        if self._config.open_groups == "wait":
            return
        waiting = [
            group
            for group in self._board.groups.values()
            if group.task.environment == environment
            and not group.is_settled
            and not self._board.is_assigned(group)
        ]
        for group in waiting:
            self._cut_group(group, f"environment {environment} is left out")
        self._of(environment).num_groups_cut += len(waiting)

    def _cut_group(self, group: Group, reason: str) -> None:
        if self._config.open_groups == "partial" and len(group.members) >= 2:
            self._board.train_without_missing(group, reason)
        else:
            self._board.drop(group, TrajectoryState.GROUP_DROPPED, reason)
