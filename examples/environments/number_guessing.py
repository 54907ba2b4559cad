"""A game of several turns: find a hidden number by guessing.

    cd examples/environments
    penstock env serve number_guessing:NumberGuessing --option highest=20 max_guesses=5

The whole of what an environment needs: describe, reset, step, close. What the policy
gets wrong (a guess that is no number) is something that it can read, and costs a turn.
"""

from __future__ import annotations

import random
import re

from environments.base import Description, Message, StepResult
from environments.digest import settings_digest
from penstock.errors import ConfigError
from penstock.trajectory import NOT_YET, Reward, Task

_NUM_TASKS = {"train": 10_000, "eval": 1_000}


class NumberGuessing:
    """1 for the hidden number, and 0 if the guesses run out."""

    def __init__(self, *, highest: int = 20, max_guesses: int = 5) -> None:
        if highest < 2 or max_guesses < 1:
            raise ConfigError(
                f"highest is {highest} and max_guesses {max_guesses}; expected at least 2 and 1"
            )
        self._highest = highest
        self._max_guesses = max_guesses
        self._hidden = 0
        self._num_guesses = 0

    def describe(self) -> Description:
        return Description(
            name="number_guessing",
            version="1",
            digest=settings_digest(
                {"version": 1, "highest": self._highest, "max_guesses": self._max_guesses}
            ),
            splits=_NUM_TASKS,
            max_turns=self._max_guesses,
        )

    def reset(self, task: Task) -> tuple[Message, ...]:
        self._hidden = random.Random(f"{task.split} {task.index} {task.seed}").randint(1, self._highest)
        self._num_guesses = 0
        text = f"I think of a number from 1 to {self._highest}. You have {self._max_guesses} guesses."
        return (Message(role="user", content=text),)

    def step(self, action: str) -> StepResult:
        self._num_guesses += 1
        guess = _number_in(action)
        if guess == self._hidden:
            return self._end(1.0)
        if self._num_guesses == self._max_guesses:
            return self._end(0.0)
        return StepResult(
            done=False, messages=(Message(role="tool", content=self._hint(guess)),), reward=NOT_YET
        )

    def close(self) -> None:
        """Nothing is held open."""

    def _hint(self, guess: int | None) -> str:
        if guess is None:
            return "That is not a number."
        return "Too low." if guess < self._hidden else "Too high."

    def _end(self, value: float) -> StepResult:
        return StepResult(
            done=True, reward=Reward.valid(value), metrics={"num_guesses": float(self._num_guesses)}
        )


def _number_in(action: str) -> int | None:
    found = re.search(r"-?\d{1,9}", action)
    return int(found.group()) if found else None
