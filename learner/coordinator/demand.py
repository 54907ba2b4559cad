"""How many actors the learner could use, from measured rates. Pure.

With `a` actors that each finish g trajectories a second, and a learner that trains l a
second, min(a * g, l) are trained: from a = l / g on, another actor adds only lag. Nor can
more slots be leased than `pipeline_depth` steps' groups have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from learner.config import ScheduleConfig

_LEASES = 512
_STEPS = 16


class Demand:
    """Remembers the last leases and steps, and says how many actors would keep up."""

    def __init__(self, schedule: ScheduleConfig) -> None:
        self._schedule = schedule
        self._leases: deque[tuple[float, bool]] = deque(maxlen=_LEASES)
        self._steps: deque[tuple[float, int]] = deque(maxlen=_STEPS)
        self._slots_an_actor = 0.0

    def lease_ended(self, seconds: float, *, filled: bool) -> None:
        """A lease took one of an actor's slots for so long, and filled one of a group's, or came to nothing."""
        self._leases.append((seconds, filled))

    def step_trained(self, seconds: float, num_trajectories: int) -> None:
        """seconds: from the batch to the version, without any wait for actors."""
        self._steps.append((seconds, num_trajectories))

    def wanted(self, num_slots: Sequence[int], *, finished: bool) -> int:
        """num_slots: of each connected actor. Until there are rates: as many as there are, and at least one."""
        if finished:
            return 0
        if num_slots:
            self._slots_an_actor = sum(num_slots) / len(num_slots)
        # Copies: a scrape asks from a thread of its own.
        leases, steps = list(self._leases), list(self._steps)
        lease_seconds = sum(seconds for seconds, _ in leases)
        num_filled = sum(filled for _, filled in leases)
        step_seconds = sum(seconds for seconds, _ in steps)
        if not (self._slots_an_actor and num_filled and lease_seconds and step_seconds):
            return max(len(num_slots), 1)
        schedule = self._schedule
        num_leasable = schedule.depth * schedule.groups_per_step * schedule.group_size
        most = math.ceil(num_leasable / self._slots_an_actor)
        if schedule.max_lag == 0:
            # The learner idles while rollouts are played: every slot that can be leased shortens that.
            return most
        actor_rate = self._slots_an_actor * num_filled / lease_seconds
        learner_rate = sum(number for _, number in steps) / step_seconds
        return min(max(math.ceil(learner_rate / actor_rate), 1), most)
