"""Dynamic sampling: complete groups that teach nothing are dropped, and admission opens others in their place."""

from __future__ import annotations

from learner.algorithms.filters import is_informative
from learner.coordinator.groups import Group


class Sieve:
    """Drops groups with equal rewards, up to a bound for each step, so that a run on hopeless tasks goes on."""

    def __init__(self, *, max_dropped: int) -> None:
        """max_dropped: groups from one version to the next."""
        self._max_dropped = max_dropped
        self._num_dropped = 0

    def drops(self, group: Group) -> bool:
        """Whether a complete group is dropped. Counts it if so: ask once."""
        if is_informative([member.reward for member in group.members]):
            return False
        if self._num_dropped >= self._max_dropped:
            return False
        self._num_dropped += 1
        return True

    def reset(self) -> None:
        """A step was taken."""
        self._num_dropped = 0
