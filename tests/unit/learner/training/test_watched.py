"""A step has a limit; waiting for a batch has none."""

from __future__ import annotations

from typing import Any, cast

import pytest

from learner.training.step import StepReport
from learner.training.watched import LEAST_SECONDS, Watched
from penstock.trajectory import PolicyVersion
from penstock.watchdog import Watchdog


class Dog:
    """Notes when it was armed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float] | None] = []

    def arm(self, what: str, seconds: float) -> None:
        self.calls.append((what, seconds))

    def disarm(self) -> None:
        self.calls.append(None)


class Steps:
    def __init__(self, dog: Dog) -> None:
        self.dog = dog

    def step(self, batch: Any, version: PolicyVersion, *, learning_rate: float) -> StepReport:
        assert self.dog.calls[-1] == (f"step {version.step} of the trainer", LEAST_SECONDS)
        if learning_rate < 0:
            raise RuntimeError("as told")
        return cast("StepReport", "report")


def test_a_step_is_watched_and_what_comes_after_it_is_not():
    dog = Dog()
    watched = Watched(Steps(dog), cast("Watchdog", dog))
    report: object = watched.step(cast("Any", None), PolicyVersion(1, 4), learning_rate=0.1)
    assert report == "report"
    assert dog.calls[-1] is None
    with pytest.raises(RuntimeError):
        watched.step(cast("Any", None), PolicyVersion(1, 5), learning_rate=-1.0)
    assert dog.calls[-1] is None


def test_the_limit_follows_the_usual_step():
    dog = Dog()
    watched = Watched(Steps(dog), cast("Watchdog", dog))
    watched._seconds.extend([100.0, 500.0, 900.0])
    assert watched.limit_seconds == 2500.0
