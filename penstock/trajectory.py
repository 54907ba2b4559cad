"""The values that learner, actors and environments exchange.

Their wire forms stand in protos/penstock/v1/trajectory.proto; `penstock.codec` turns
one into the other. Shapes: T tokens of one trajectory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ConfigError

TokenIds = NDArray[np.int32]


class PolicyVersion(NamedTuple):
    """Names one published set of weights. Written `epoch.step`; ordered by epoch, then step."""

    epoch: int
    """Grows with each start of the trainer, so that no two sets of tensors share a name."""
    step: int
    """Optimiser steps since the policy that the run started from."""

    def __str__(self) -> str:
        return f"{self.epoch}.{self.step}"


class VersionSpan(NamedTuple):
    """A run of consecutive sampled tokens made by one version."""

    version: PolicyVersion
    num_tokens: int


class InstallMode(StrEnum):
    """What becomes of sequences in mid-generation when a new version is installed."""

    KEEP = "keep"
    """They go on with the keys and values that older versions computed."""
    RECOMPUTE = "recompute"
    """The new version first reads them again from their beginning."""


class RewardStatus(StrEnum):
    VALID = "valid"
    NOT_YET = "not_yet"
    UNSCORABLE = "unscorable"
    INFRASTRUCTURE_ERROR = "infrastructure_error"
    SCORER_TIMEOUT = "scorer_timeout"


class FinishReason(StrEnum):
    DONE = "done"
    """The environment ended the episode."""
    LENGTH = "length"
    """The last turn was cut at a token limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A value only if the status is VALID: a failure is never a reward of zero."""

    status: RewardStatus
    value: float | None = None
    message: str = ""

    @classmethod
    def valid(cls, value: float) -> Reward:
        return cls(status=RewardStatus.VALID, value=value)


NOT_YET = Reward(status=RewardStatus.NOT_YET)


@dataclass(frozen=True, slots=True)
class Task:
    """One task of one environment. The members of a group share all four fields."""

    environment: str
    split: str
    index: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are sampled, and under which settings their log-probabilities hold."""

    temperature: float = 1.0
    """0 is greedy; log-probabilities are then those of temperature 1."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this mass. 1 keeps all."""
    top_k: int = 0
    """Keep the k likeliest tokens. 0 keeps all."""
    max_tokens: int = 256
    """Sampled tokens that an episode may hold, over all its turns."""
    seed: int = 0
    """Seeds the sampler of this episode. 0 leaves the choice to the engine."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(f"temperature is {self.temperature}; expected 0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}; expected more than 0, at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; expected 0 (keep all) or more")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """A rollout that its actor could not finish: enough to go on from its last token elsewhere."""

    token_ids: TokenIds
    """[T] int32."""
    loss_mask: NDArray[np.uint8]
    """[T] uint8: 1 where the policy sampled the token."""
    logprobs: NDArray[np.float32]
    """[T] float32; 0 where the mask is 0."""
    versions: tuple[VersionSpan, ...]
    """Covers the sampled tokens in order."""
    num_turns: int
    """Turns that the policy finished. One more may have begun."""
    cut: bool
    """The last finished turn was cut at a token limit."""
    environment_version: str
    environment_digest: str
    observation_digest: str
    generation_seconds: float = 0.0
    environment_seconds: float = 0.0


class Pin(NamedTuple):
    """An evaluation's: every token of the rollout must be of this version."""

    version: PolicyVersion
    limit_seconds: float
    """From the grant on; after that the evaluation is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right, and the duty, to fill one slot of a group."""

    lease_id: str
    group_id: int
    slot: int
    attempt: int
    """How often the slot was leased before. Fences the environment's session."""
    task: Task
    sampling: Sampling
    progress_timeout_seconds: float
    rival: bool = False
    """Another lease of the slot is still played elsewhere, and the first result wins: this
    one needs an environment session of its own."""
    continues: bool = False
    """Another actor played a part of it before it left."""
    partial: Partial | None = None
    """That part, where it is needed: on the actor."""
    pin: Pin | None = None
    """Set in a lease of an evaluation, which `group_id` then numbers: its trajectory never trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What one episode leaves behind."""

    trajectory_id: str
    """32 hexadecimal digits."""
    lease_id: str
    token_ids: TokenIds
    """[T] int32: prompt and every turn, in order."""
    loss_mask: NDArray[np.uint8]
    """[T] uint8: 1 where the policy sampled the token."""
    logprobs: NDArray[np.float32]
    """[T] float32: under the behaviour policy and the lease's sampling; 0 where the mask is 0."""
    versions: tuple[VersionSpan, ...]
    """Covers the sampled tokens in order."""
    reward: Reward
    finish_reason: FinishReason
    num_turns: int
    task: Task
    environment_version: str
    environment_digest: str
    observation_digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    generation_seconds: float = 0.0
    environment_seconds: float = 0.0

    @property
    def num_sampled(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def oldest(self) -> PolicyVersion:
        """The version whose step is lowest: the one that lag is counted from."""
        return min((span.version for span in self.versions), key=lambda version: version.step)

    @property
    def is_mixed(self) -> bool:
        return len({span.version for span in self.versions}) > 1


def run_length(versions: Iterable[PolicyVersion]) -> tuple[VersionSpan, ...]:
    """Encodes one version per sampled token as spans."""
    spans: list[VersionSpan] = []
    for version in versions:
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(version, spans[-1].num_tokens + 1)
        else:
            spans.append(VersionSpan(version, 1))
    return tuple(spans)
