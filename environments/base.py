"""What an environment is, in Python.

An `Environment` plays one episode at a time: `reset` with a task, then `step` with
what the policy wrote, until a step says `done`. It runs in a worker process of its
own, so it may block, and it may be killed at a deadline.

Whatever the policy does wrong is an observation or a reward. Whatever the environment
does wrong is an exception: EnvironmentFault(kind=DATA) if the task itself is broken,
anything else counts as infrastructure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from penstock.trajectory import NOT_YET, Reward, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: str
    """"system", "user", "tool"; "assistant" for turns shown as examples."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What `Describe` says of an environment."""

    name: str
    version: str
    digest: str
    """Hexadecimal; changes whenever the same task could yield another episode or reward."""
    splits: Mapping[str, int]
    """Tasks in "train" and in "eval"; 0 when unbounded. No task is in both."""
    max_turns: int = 1
    """0 when unbounded."""
    session_ttl_seconds: float = 60.0
    max_sessions: int = 0
    """Sessions that may be open at once; 0 when unbounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    done: bool
    messages: tuple[Message, ...] = ()
    """What the policy reads next; empty when done."""
    reward: Reward = NOT_YET
    """Of the whole episode, with the step that is done."""
    metrics: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """Plays one episode at a time."""

    def describe(self) -> Description: ...

    def reset(self, task: Task) -> tuple[Message, ...]:
        """Begins the task's episode: equal tasks give equal messages. Raises EnvironmentFault."""
        ...

    def step(self, action: str) -> StepResult:
        """Hands over what the policy wrote. Raises EnvironmentFault."""
        ...

    def close(self) -> None:
        """Frees what the episode holds."""
        ...
