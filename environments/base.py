"""What an environment is, in Python.

There are three forms. An `Environment` plays one episode at a time: `reset` with a task,
then `step` with what the policy wrote, until a step says `done`; it keeps a worker
process to itself for the life of a session. A `SingleTurnEnvironment` is a question and
a scorer without memory: any worker may score any answer, so a few of them serve
thousands of sessions. A `BatchedEnvironment` is the same with a scorer that takes many answers
at once. All run in worker processes, so they may block, and they may be killed at a deadline.

Whatever the policy does wrong is an observation or a reward. Whatever the environment
does wrong is an exception: EnvironmentFault(kind=DATA) if the task itself is broken,
anything else counts as infrastructure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from penstock.errors import ConfigError
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

    def __post_init__(self) -> None:
        if not self.name or not self.version:
            raise ConfigError(
                f"an environment's name is {self.name!r} and its version {self.version!r}; expected text"
            )
        if not self.digest or set(self.digest) - set("0123456789abcdef"):
            raise ConfigError(
                f"the digest of {self.name} is {self.digest!r}; expected lower-case hexadecimal digits"
            )
        if not self.splits or set(self.splits) - {"train", "eval"}:
            raise ConfigError(
                f'{self.name} has the splits {sorted(self.splits)}; expected "train", "eval" or both'
            )
        if min(self.splits.values()) < 0 or self.max_turns < 0 or self.max_sessions < 0:
            raise ConfigError(f"{self.name} counts tasks, turns or sessions below 0; 0 stands for unbounded")
        if not 0.1 <= self.session_ttl_seconds <= 86_400:
            raise ConfigError(f"session_ttl_seconds is {self.session_ttl_seconds}; expected 0.1 to 86400")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    done: bool
    messages: tuple[Message, ...] = ()
    """What the policy reads next; empty when done."""
    reward: Reward = NOT_YET
    """Of the whole episode, with the step that is done."""
    metrics: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """Plays one episode at a time, and is used again for the next."""

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


class SingleTurnEnvironment(Protocol):
    """A question and a scorer. Nothing is kept between calls; `max_turns` is 1."""

    def describe(self) -> Description: ...

    def prompt(self, task: Task) -> tuple[Message, ...]:
        """The task's question: equal for equal tasks, in every process. Raises EnvironmentFault."""
        ...

    def score(self, task: Task, action: str) -> StepResult:
        """Judges an answer; the result is `done`. Raises EnvironmentFault."""
        ...


class BatchedEnvironment(Protocol):
    """A SingleTurnEnvironment that scores answers together, as a model does that must not run once for each."""

    def describe(self) -> Description: ...

    def prompt(self, task: Task) -> tuple[Message, ...]:
        """As a SingleTurnEnvironment's."""
        ...

    def score_batch(self, answers: Sequence[tuple[Task, str]]) -> Sequence[StepResult]:
        """Judges answers to tasks, in their order; each result is `done`. Raises EnvironmentFault, for all of them."""
        ...


AnyEnvironment = Environment | SingleTurnEnvironment | BatchedEnvironment


class Form(StrEnum):
    """Which of them an environment is."""

    STEPPED = "stepped"
    SINGLE_TURN = "single_turn"
    BATCHED = "batched"
