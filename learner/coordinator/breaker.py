"""Whether one environment is leased: closed, open, or probing. Pure: the clock's reading is passed in.

    closed -- half of its last rollouts failed, or half of them are overdue --> open
    open -- a pause, twice as long each time --> probing
    probing -- two rollouts came to their end --> closed
    probing -- one failed, or is overdue --> open

A call is overdue when it has taken `slow_factor` times what is usual for this environment.
What is usual is learnt while it is closed, and only from calls that were answered; until
some were, only failures count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Set
from enum import StrEnum

from learner.config import BreakerConfig

_RECENT = 16
"""Ended rollouts that are looked at."""
_ANSWERS_KEPT = 256.0
"""Answers that the usual time is a mean of, older ones fading."""
_LEAST_ANSWERS = 8.0
NUM_PROBES = 2
_LONGEST_PAUSE = 12
"""Times the first one."""


class BreakerState(StrEnum):
    CLOSED = "closed"
    """Leased like every other environment."""
    OPEN = "open"
    """Left out, so that the others go on."""
    PROBING = "probing"
    """A few rollouts try it."""


class Breaker:
    """Judges an environment by its rollouts' ends and by how long they wait for it.

    Methods that may change the state return the new one, and None if it is as it was.
    """

    def __init__(self, config: BreakerConfig) -> None:
        self.state = BreakerState.CLOSED
        self.reason = ""
        """Why it was opened last."""
        self.since = 0.0
        """Monotonic seconds of the last change."""
        self._config = config
        self._failed: deque[bool] = deque(maxlen=_RECENT)
        self._num_answers = 0.0
        self._answer_seconds = 0.0
        self._probes: set[str] = set()
        self._num_passed = 0
        self._pause_seconds = config.probe_seconds

    @property
    def may_lease(self) -> bool:
        if self.state is BreakerState.PROBING:
            return len(self._probes) + self._num_passed < NUM_PROBES
        return self.state is BreakerState.CLOSED

    @property
    def overdue_seconds(self) -> float | None:
        """From when on a call is overdue; None while nothing is usual yet."""
        config = self._config
        if self._num_answers < _LEAST_ANSWERS or config.slow_factor == 0:
            return None
        return max(config.slow_factor * self._answer_seconds / self._num_answers, config.slow_seconds)

    def probe_due_seconds(self, now: float) -> float:
        """Until an open one is tried again."""
        return max(self.since + self._pause_seconds - now, 0.0)

    def leased(self, lease_id: str) -> None:
        if self.state is BreakerState.PROBING:
            self._probes.add(lease_id)

    def answered(self, num_answers: int, seconds: float) -> None:
        """So many calls were answered, after so many seconds in all."""
        if self.state is not BreakerState.CLOSED:
            return
        keep = max(1.0 - num_answers / _ANSWERS_KEPT, 0.0)
        self._num_answers = keep * self._num_answers + num_answers
        self._answer_seconds = keep * self._answer_seconds + seconds

    def rollout_ended(self, lease_id: str, *, failure: str, now: float) -> BreakerState | None:
        """failure: what went wrong with the environment; empty if the rollout came to its end."""
        is_probe = lease_id in self._probes
        self._probes.discard(lease_id)
        if self.state is BreakerState.CLOSED:
            self._failed.append(bool(failure))
            if not failure:
                return None
            num_failed = sum(self._failed)
            if num_failed >= self._config.failures and 2 * num_failed >= len(self._failed):
                return self._open(
                    f"{num_failed} of its last {len(self._failed)} rollouts failed: {failure}", now
                )
        elif self.state is BreakerState.PROBING and is_probe:
            if failure:
                return self._open(f"a probe failed: {failure}", now)
            self._num_passed += 1
            if self._num_passed >= NUM_PROBES:
                return self._enter(BreakerState.CLOSED, now)
        return None

    def look(
        self,
        waits: Mapping[str, float],
        rollouts: Callable[[], Set[str]],
        *,
        others_go_on: bool,
        now: float,
    ) -> BreakerState | None:
        """Call once a second.

        waits: by live lease of this environment that waits for an answer, for how long.
        rollouts: all its live leases, which takes a while to find.
        others_go_on: another environment could use what this one holds up.
        """
        if self.state is BreakerState.OPEN:
            return None if self.probe_due_seconds(now) else self._enter(BreakerState.PROBING, now)
        limit = self.overdue_seconds
        overdue = {lease_id for lease_id, wait in waits.items() if limit is not None and wait > limit}
        if self.state is BreakerState.PROBING:
            self._probes &= rollouts()
            if overdue & self._probes:
                return self._open(f"a probe waits for longer than {limit:.1f} s", now)
        elif others_go_on and len(overdue) >= self._config.failures:
            num_rollouts = len(rollouts())
            if len(overdue) >= num_rollouts / 2:
                return self._open(
                    f"{len(overdue)} of its {num_rollouts} rollouts wait for longer than {limit:.1f} s", now
                )
        return None

    def _open(self, reason: str, now: float) -> BreakerState:
        """The next probe waits twice as long as the one before, unless this was sound for some time."""
        longest = _LONGEST_PAUSE * self._config.probe_seconds
        was_sound = self.state is BreakerState.CLOSED and now - self.since > longest
        has_been_open = bool(self.reason)
        if was_sound or not has_been_open:
            self._pause_seconds = self._config.probe_seconds
        else:
            self._pause_seconds = min(2 * self._pause_seconds, longest)
        self.reason = reason
        return self._enter(BreakerState.OPEN, now)

    def _enter(self, state: BreakerState, now: float) -> BreakerState:
        self.state, self.since = state, now
        self._failed.clear()
        self._probes.clear()
        self._num_passed = 0
        return state
