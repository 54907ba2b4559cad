"""A step that takes far longer than steps do ends the trainer: a collective or a kernel hangs.

Waiting for a batch is no part of a step, and has no limit: actors may come back any time.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

from learner.training.batch import Batch
from learner.training.step import Algorithm, StepReport
from penstock.trajectory import PolicyVersion
from penstock.watchdog import Watchdog

LEAST_SECONDS = 600.0
_FACTOR = 5.0
_WINDOW = 32


class Watched:
    """An Algorithm under a watchdog: max(10 minutes, 5 times the median step)."""

    def __init__(self, algorithm: Algorithm, watchdog: Watchdog) -> None:
        self._algorithm = algorithm
        self._watchdog = watchdog
        self._seconds: deque[float] = deque(maxlen=_WINDOW)

    @property
    def limit_seconds(self) -> float:
        usual = statistics.median(self._seconds) if self._seconds else 0.0
        return max(LEAST_SECONDS, _FACTOR * usual)

    def step(self, batch: Batch, version: PolicyVersion, *, learning_rate: float) -> StepReport:
        started = time.monotonic()
        self._watchdog.arm(f"step {version.step} of the trainer", self.limit_seconds)
        try:
            return self._algorithm.step(batch, version, learning_rate=learning_rate)
        finally:
            self._watchdog.disarm()
            self._seconds.append(time.monotonic() - started)
