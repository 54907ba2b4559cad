"""Environments that do on request what no environment should. Loaded by worker processes."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from environments.base import Description, Message, StepResult
from penstock.errors import EnvironmentFault, FaultKind
from penstock.trajectory import Reward, RewardStatus, Task


def _hang() -> None:
    while True:
        pass


def _say_and_hang() -> None:
    print("hanging")
    _hang()


def _sleep() -> None:
    time.sleep(3600)


def _die() -> None:
    os._exit(3)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _exit() -> None:
    sys.exit(0)


def _raise() -> None:
    raise ValueError("a bug")


def _data_fault() -> None:
    raise EnvironmentFault("this task is broken", kind=FaultKind.DATA)


def _eat_memory() -> None:
    hoard = []
    while True:
        hoard.append(bytearray(16 * 1024 * 1024))


def _forge() -> None:
    """Writes what is no frame to every socket that it finds."""
    for descriptor in range(3, 64):
        try:
            channel = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue
        channel.send(b"\x05\x00\x00\x00{nope")


def _flood() -> None:
    for _ in range(300):
        print("x" * 10_000)


ACTIONS: dict[str, Callable[[], None]] = {
    "hang": _hang,
    "say and hang": _say_and_hang,
    "sleep": _sleep,
    "die": _die,
    "crash": _crash,
    "exit": _exit,
    "raise": _raise,
    "data": _data_fault,
    "memory": _eat_memory,
    "forge": _forge,
    "flood": _flood,
}
RESULTS: dict[str, Any] = {
    "nan": StepResult(done=True, reward=Reward.valid(float("nan"))),
    "infinite": StepResult(done=True, reward=Reward.valid(float("inf"))),
    "text": StepResult(done=True, reward=Reward(status=RewardStatus.VALID, value="1")),  # type: ignore[arg-type]
    "true": StepResult(done=True, reward=Reward(status=RewardStatus.VALID, value=True)),
    "bare": 1.0,
    "nothing": None,
    "no reward": StepResult(done=True),
    "surrogate": StepResult(done=False, messages=(Message(role="tool", content="\ud800"),)),
    "role": StepResult(done=False, messages=(Message(role="oracle", content=""),)),
    "huge": StepResult(
        done=True, messages=(Message(role="tool", content="x" * 9_000_000),), reward=Reward.valid(1.0)
    ),
}
RIGHT = StepResult(done=True, reward=Reward.valid(1.0))


def _perform(action: str) -> StepResult:
    if action in ACTIONS:
        ACTIONS[action]()
    result: StepResult = RESULTS.get(action, RIGHT)
    return result


class Hostile:
    """Of several turns."""

    def describe(self) -> Description:
        return Description(name="hostile", version="1", digest="00", splits={"train": 100}, max_turns=0)

    def reset(self, task: Task) -> tuple[Message, ...]:
        if task.index == 99:
            _hang()
        return (Message(role="user", content=f"task {task.index}"),)

    def step(self, action: str) -> StepResult:
        if action == "go on":
            return StepResult(done=False, messages=(Message(role="tool", content="more"),))
        return _perform(action)

    def close(self) -> None: ...


class Forgetful(Hostile):
    """Equal tasks don't look alike."""

    def reset(self, task: Task) -> tuple[Message, ...]:
        return (Message(role="user", content=str(random.random())),)


class HostileScorer:
    """Of a single turn."""

    def describe(self) -> Description:
        return Description(name="hostile_scorer", version="1", digest="00", splits={"train": 100_000})

    def prompt(self, task: Task) -> tuple[Message, ...]:
        return (Message(role="user", content=f"task {task.index}"),)

    def score(self, task: Task, action: str) -> StepResult:
        return _perform(action)
