"""What an evaluation asks: the same tasks and the same seeds each time, so that policies compare. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from penstock.seeds import derive_seed
from penstock.trajectory import Task


@dataclass(frozen=True, slots=True)
class Question:
    """One answer to one task."""

    task: Task
    sample: int
    """Which of the task's answers."""

    @property
    def prompt(self) -> tuple[str, int]:
        return self.task.environment, self.task.index

    @property
    def sampling_seed(self) -> int:
        """This answer's alone."""
        name = zlib.crc32(self.task.environment.encode())
        return derive_seed(self.task.seed, name, self.task.index, self.sample)


def ask(sizes: Mapping[str, int], *, split: str, samples: int, seed: int) -> tuple[Question, ...]:
    """The first tasks of each environment, the environments in turn, so that none comes last.

    sizes: how many tasks, by environment.
    """
    tasks = [
        Task(environment, split, index, seed)
        for index in range(max(sizes.values(), default=0))
        for environment, size in sizes.items()
        if index < size
    ]
    return tuple(Question(task, sample) for task in tasks for sample in range(samples))
