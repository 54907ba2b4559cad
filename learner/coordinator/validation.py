"""Is a submitted trajectory well-formed, and what was leased?

Everything that could poison a training step is refused here, with a code, before it
is stored. What comes too late or twice is well-formed; the scheduler decides on that.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from penstock import codec
from penstock.errors import PenstockError, ProtocolError
from penstock.trajectory import PolicyVersion, RewardStatus, Task, Trajectory
from penstock.v1 import trajectory_pb2

_TRAJECTORY_ID = re.compile(r"[0-9a-f]{32}")


class RejectionCode(StrEnum):
    BAD_ID = "bad_id"
    BAD_LENGTHS = "bad_lengths"
    BAD_MASK = "bad_mask"
    TOKEN_OUT_OF_RANGE = "token_out_of_range"  # noqa: S105
    NON_FINITE_LOGPROB = "non_finite_logprob"
    POSITIVE_LOGPROB = "positive_logprob"
    BAD_VERSIONS = "bad_versions"
    UNKNOWN_VERSION = "unknown_version"
    UNKNOWN_LEASE = "unknown_lease"
    WRONG_TASK = "wrong_task"
    BAD_REWARD = "bad_reward"
    TOO_LONG = "too_long"
    OBSERVATION_DIFFERS = "observation_differs"
    EMPTY = "empty"


class Rejected(PenstockError):
    """A trajectory that is not kept."""

    def __init__(self, code: RejectionCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the run's policy and sampling allow."""

    vocab_size: int
    max_sampled_tokens: int
    max_context: int


def decode(message: trajectory_pb2.Trajectory) -> Trajectory:
    """Decodes a trajectory. Raises Rejected."""
    if not _TRAJECTORY_ID.fullmatch(message.trajectory_id):
        raise Rejected(
            RejectionCode.BAD_ID,
            f"trajectory_id is {message.trajectory_id[:40]!r}; expected 32 hexadecimal digits",
        )
    num_tokens = len(message.loss_mask)
    if num_tokens == 0 or {len(message.token_ids), len(message.logprobs)} != {4 * num_tokens}:
        raise Rejected(
            RejectionCode.BAD_LENGTHS,
            f"{len(message.token_ids)}, {len(message.logprobs)} and {num_tokens} bytes of token_ids, logprobs "
            "and loss_mask; expected 4, 4 and 1 a token, and at least one token",
        )
    try:
        return codec.trajectory_from_wire(message)
    except ProtocolError as error:
        raise Rejected(RejectionCode.BAD_REWARD, str(error)) from error


def check(trajectory: Trajectory, limits: Limits, published: Collection[PolicyVersion]) -> None:
    """Checks everything that doesn't depend on the lease. Raises Rejected."""
    _check_arrays(trajectory, limits)
    _check_versions(trajectory, published)
    _check_reward(trajectory)


def check_task(trajectory: Trajectory, task: Task, observation_digest: str | None) -> None:
    """Checks a trajectory against the group that it was leased for. Raises Rejected.

    observation_digest: that of the group's other members; None if there are none yet.
    """
    if trajectory.task != task:
        raise Rejected(RejectionCode.WRONG_TASK, f"task is {trajectory.task}; leased was {task}")
    if observation_digest is not None and trajectory.observation_digest != observation_digest:
        raise Rejected(
            RejectionCode.OBSERVATION_DIFFERS,
            f"the first observation's digest is {trajectory.observation_digest!r}; the group's other members "
            f"have {observation_digest!r}: the environment does not give equal tasks equal observations",
        )


def _check_arrays(trajectory: Trajectory, limits: Limits) -> None:
    mask_t = trajectory.loss_mask
    num_tokens, num_sampled = len(mask_t), int(np.count_nonzero(mask_t))
    if mask_t.max() > 1 or num_sampled == 0:
        raise Rejected(RejectionCode.BAD_MASK, "loss_mask must hold 0 and 1 only, and at least one 1")
    if mask_t[0] == 1:
        raise Rejected(RejectionCode.BAD_MASK, "loss_mask marks the first token, which nothing precedes")
    lowest, highest = int(trajectory.token_ids.min()), int(trajectory.token_ids.max())
    if lowest < 0 or highest >= limits.vocab_size:
        raise Rejected(
            RejectionCode.TOKEN_OUT_OF_RANGE,
            f"token ids run from {lowest} to {highest}; expected 0 to {limits.vocab_size - 1}",
        )
    if num_sampled > limits.max_sampled_tokens or num_tokens > limits.max_context:
        raise Rejected(
            RejectionCode.TOO_LONG,
            f"{num_sampled} sampled of {num_tokens} tokens; at most {limits.max_sampled_tokens} of "
            f"{limits.max_context} are allowed",
        )
    logprobs_t = trajectory.logprobs
    if not np.isfinite(logprobs_t).all():
        raise Rejected(RejectionCode.NON_FINITE_LOGPROB, "logprobs hold a NaN or an infinity")
    if logprobs_t.max() > 0:
        raise Rejected(
            RejectionCode.POSITIVE_LOGPROB, f"logprobs reach {logprobs_t.max():.3g}; expected at most 0"
        )


def _check_versions(trajectory: Trajectory, published: Collection[PolicyVersion]) -> None:
    spans = trajectory.versions
    covered = sum(span.num_tokens for span in spans)
    if covered != trajectory.num_sampled or any(span.num_tokens == 0 for span in spans):
        raise Rejected(
            RejectionCode.BAD_VERSIONS,
            f"version spans cover {covered} tokens; expected each of the {trajectory.num_sampled} sampled, "
            "and no empty span",
        )
    for span in spans:
        if span.version not in published:
            raise Rejected(RejectionCode.UNKNOWN_VERSION, f"version {span.version} was never published here")
    if any(later.version <= earlier.version for earlier, later in itertools.pairwise(spans)):
        names = ", ".join(str(span.version) for span in spans[:8])
        raise Rejected(RejectionCode.BAD_VERSIONS, f"version spans run {names}; expected them to grow")


def _check_reward(trajectory: Trajectory) -> None:
    reward = trajectory.reward
    if reward.status is not RewardStatus.VALID or reward.value is None or not math.isfinite(reward.value):
        raise Rejected(
            RejectionCode.BAD_REWARD,
            f"reward is {reward.value} with status {reward.status}; expected a finite value with status valid",
        )
    for name, value in trajectory.metrics.items():
        if not math.isfinite(value):
            raise Rejected(RejectionCode.BAD_REWARD, f"metric {name!r} is {value}; expected a finite number")
