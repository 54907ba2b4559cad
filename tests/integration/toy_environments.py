"""Environments that behave, and environments that don't. Served by `penstock env serve`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from environments.base import Description, Message, StepResult
from penstock.trajectory import Reward, Task


class Letters:
    """Question and answer: the reward is the share of `a` in what was written."""

    def __init__(self, name: str = "letters", num_train: int = 64) -> None:
        self._name = name
        self._num_train = num_train

    def describe(self) -> Description:
        return Description(
            name=self._name, version="1", digest="ab", splits={"train": self._num_train, "eval": 8}
        )

    def prompt(self, task: Task) -> tuple[Message, ...]:
        letter = "abcdefgh"[task.index % 8]
        return (Message(role="user", content=f"{letter * (1 + task.index % 3)}="),)

    def score(self, task: Task, action: str) -> StepResult:
        return StepResult(done=True, reward=Reward.valid(action.count("a") / max(len(action), 1)))


class TrainOnly(Letters):
    """Has nothing to evaluate on."""

    def describe(self) -> Description:
        return Description(name=self._name, version="1", digest="ab", splits={"train": 8})


class Faulty(Letters):
    """Fails in the way that its name says, at every answer."""

    def __init__(self, how: str) -> None:
        super().__init__(name=f"faulty_{how}")
        self._how = how

    def score(self, task: Task, action: str) -> StepResult:
        if self._how == "crash":
            os._exit(3)
        if self._how == "hang":
            time.sleep(3600)
        if self._how == "raise":
            raise RuntimeError("the scorer is broken")
        if self._how == "nan":
            return StepResult(done=True, reward=Reward.valid(float("nan")))
        return StepResult(done=True)  # no reward at all


class Turncoat(Letters):
    """Behaves until a file exists, which says how not to: hang, slow, die, garbage or nan."""

    SECONDS = 0.05

    def __init__(self, order: str) -> None:
        super().__init__(name="turncoat")
        self._order = Path(order)

    def score(self, task: Task, action: str) -> StepResult:
        time.sleep(self.SECONDS)
        match self._order.read_text() if self._order.exists() else "":
            case "hang":
                time.sleep(3600)
            case "slow":
                time.sleep(29 * self.SECONDS)
            case "die":
                os._exit(3)
            case "garbage":
                return "1.0"  # type: ignore[return-value]
            case "nan":
                return StepResult(done=True, reward=Reward.valid(float("nan")))
        return super().score(task, action)


class Gated(Letters):
    """Gives no score until a file exists."""

    def __init__(self, gate: str) -> None:
        super().__init__(name="gated")
        self._gate = Path(gate)

    def score(self, task: Task, action: str) -> StepResult:
        while not self._gate.exists():
            time.sleep(0.05)
        return super().score(task, action)
