"""Which task each group plays: a function of the run's seed and the group's number.

Nothing is stored: after a restart the order goes on where the ledger's last group
left it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from penstock.errors import ConfigError
from penstock.seeds import derive_seed
from penstock.trajectory import Task

TRAIN = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """One environment's training split."""

    environment: str
    num_tasks: int
    """0 when unbounded."""


class TaskOrder:
    """Draws from the environments in turn; within one, every task once before any again."""

    def __init__(self, sources: Sequence[TaskSource], *, seed: int) -> None:
        if not sources:
            raise ConfigError("there is no environment to draw training tasks from")
        self._sources = tuple(sources)
        self._seed = seed

    @property
    def environments(self) -> tuple[str, ...]:
        return tuple(source.environment for source in self._sources)

    def next_group(self, group_id: int, may_lease: Callable[[str], bool]) -> int | None:
        """The first group, from this one on, whose environment may be leased; None if none may.

        Those that are passed over are never opened: what they would have played comes again
        with the environment's next turn through its tasks.
        """
        candidates = range(group_id, group_id + len(self._sources))
        return next((number for number in candidates if may_lease(self._source(number).environment)), None)

    def task(self, group_id: int) -> Task:
        source = self._source(group_id)
        turn = group_id // len(self._sources)
        return Task(source.environment, TRAIN, self._index(source, turn), derive_seed(self._seed, group_id))

    def _source(self, group_id: int) -> TaskSource:
        return self._sources[group_id % len(self._sources)]

    def _index(self, source: TaskSource, turn: int) -> int:
        if source.num_tasks == 0:
            return turn
        epoch, position = divmod(turn, source.num_tasks)
        return int(_permutation(self._seed, source.environment, epoch, source.num_tasks)[position])


@lru_cache(maxsize=64)
def _permutation(seed: int, environment: str, epoch: int, num_tasks: int) -> np.ndarray:
    name = zlib.crc32(environment.encode())
    order: np.ndarray = np.random.default_rng([seed & 0xFFFFFFFF, name, epoch]).permutation(num_tasks)
    return order
