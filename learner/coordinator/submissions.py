"""Reads trajectories as they were submitted, and checks what each of them says by itself.

A message's trajectories are read together: numpy looks once over the arrays of all of
them, and looks at each only if something is wrong with one. What depends on the run's
state is checked by the scheduler, with `validation`.

Shapes: T tokens of one trajectory, N tokens of all that are read together.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from learner.coordinator.validation import Limits, Rejected, RejectionCode
from penstock import codec
from penstock.errors import ProtocolError
from penstock.trajectory import PolicyVersion, Task, VersionSpan
from penstock.v1 import trajectory_pb2

_TaskKey = tuple[str, str, int, int]
_MAX_TASK_INDEX = 2**63 - 1
_TRAJECTORY_ID = re.compile(r"[0-9a-f]{32}")


class Sent(NamedTuple):
    """A trajectory's bytes, and the checksum that its actor made of them."""

    payload: bytes
    checksum: int


class Submission(NamedTuple):
    """A trajectory's bytes, and what the scheduler decides by."""

    payload: bytes
    checksum: int
    trajectory_id: str
    lease_id: str
    versions: tuple[VersionSpan, ...]
    num_sampled: int
    reward: float
    """NaN where there is none; then there is a flaw."""
    task: Task
    observation_digest: str
    flaw: Rejected | None
    """Why it is refused, unless it is a duplicate."""

    @property
    def oldest(self) -> PolicyVersion:
        """The version whose step is lowest: the one that lag is counted from."""
        if len(self.versions) == 1:
            return self.versions[0].version
        return min((span.version for span in self.versions), key=lambda version: version.step)

    @property
    def is_mixed(self) -> bool:
        return len(self.versions) > 1 and len({span.version for span in self.versions}) > 1


class Arrays(NamedTuple):
    """One trajectory's arrays, as bytes of agreeing lengths. T is at least 1."""

    token_ids: bytes
    """[T] int32."""
    loss_mask: bytes
    """[T] uint8."""
    logprobs: bytes
    """[T] float32."""


class _Opened(NamedTuple):
    sent: Sent
    message: trajectory_pb2.Trajectory
    arrays: Arrays
    reward: trajectory_pb2.Reward


def read(sent: Sequence[Sent], limits: Limits) -> list[Submission | Rejected]:
    """Reads the trajectories of one message, in order. Rejected: those that cannot be read at all."""
    opened = [_open(one) for one in sent]
    arrays = [one.arrays for one in opened if not isinstance(one, Rejected)]
    checked = iter(check_arrays(arrays, limits))
    tasks: dict[_TaskKey, Task] = {}
    return [one if isinstance(one, Rejected) else _submission(one, *next(checked), tasks) for one in opened]


def check_arrays(arrays: Sequence[Arrays], limits: Limits) -> list[tuple[int, Rejected | None]]:
    """The number of sampled tokens of each trajectory, and what is wrong with its arrays."""
    if not arrays:
        return []
    mask_n = np.frombuffer(b"".join([one.loss_mask for one in arrays]), dtype="u1")
    lengths = np.array([len(one.loss_mask) for one in arrays])
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    num_sampled = np.add.reduceat(mask_n, starts, dtype=np.int64)
    # As unsigned, a negative id is larger than any vocabulary. A NaN fails both comparisons.
    ids_n = np.frombuffer(b"".join([one.token_ids for one in arrays]), dtype="<u4")
    logprobs_n = np.frombuffer(b"".join([one.logprobs for one in arrays]), dtype="<f4")
    all_sound = (
        mask_n.max() <= 1
        and num_sampled.min() > 0
        and not mask_n[starts].any()
        and ids_n.max() < limits.vocab_size
        and num_sampled.max() <= limits.max_sampled_tokens
        and lengths.max() <= limits.max_context
        and logprobs_n.min() > -math.inf
        and logprobs_n.max() <= 0
    )
    if all_sound:
        return [(number, None) for number in num_sampled.tolist()]
    return [(number, _flaw(one, limits)) for number, one in zip(num_sampled.tolist(), arrays, strict=True)]


def _flaw(arrays: Arrays, limits: Limits) -> Rejected | None:
    """What is wrong with one trajectory's arrays, in words."""
    mask_t = np.frombuffer(arrays.loss_mask, dtype="u1")
    num_tokens, num_sampled = len(mask_t), int(np.count_nonzero(mask_t))
    if mask_t.max() > 1 or num_sampled == 0:
        return Rejected(RejectionCode.BAD_MASK, "loss_mask must hold 0 and 1 only, and at least one 1")
    if mask_t[0] == 1:
        return Rejected(RejectionCode.BAD_MASK, "loss_mask marks the first token, which nothing precedes")
    ids_t = np.frombuffer(arrays.token_ids, dtype="<i4")
    lowest, highest = int(ids_t.min()), int(ids_t.max())
    if lowest < 0 or highest >= limits.vocab_size:
        return Rejected(
            RejectionCode.TOKEN_OUT_OF_RANGE,
            f"token ids run from {lowest} to {highest}; expected 0 to {limits.vocab_size - 1}",
        )
    if num_sampled > limits.max_sampled_tokens or num_tokens > limits.max_context:
        return Rejected(
            RejectionCode.TOO_LONG,
            f"{num_sampled} sampled of {num_tokens} tokens; at most {limits.max_sampled_tokens} of "
            f"{limits.max_context} are allowed",
        )
    logprobs_t = np.frombuffer(arrays.logprobs, dtype="<f4")
    if not np.isfinite(logprobs_t).all():
        return Rejected(RejectionCode.NON_FINITE_LOGPROB, "logprobs hold a NaN or an infinity")
    if logprobs_t.max() > 0:
        return Rejected(
            RejectionCode.POSITIVE_LOGPROB, f"logprobs reach {logprobs_t.max():.3g}; expected at most 0"
        )
    return None


def _open(sent: Sent) -> _Opened | Rejected:
    """Finds a trajectory's parts, and that they are whole."""
    if codec.checksum(sent.payload) != sent.checksum:
        return Rejected(
            RejectionCode.CORRUPT,
            f"the checksum of its {len(sent.payload)} bytes is {codec.checksum(sent.payload):016x}; its actor "
            f"says {sent.checksum:016x}: bytes changed on the way",
        )
    try:
        message = trajectory_pb2.Trajectory.FromString(sent.payload)
    except DecodeError as error:
        return Rejected(RejectionCode.CORRUPT, f"its {len(sent.payload)} bytes are no Trajectory: {error}")
    arrays = Arrays(message.token_ids, message.loss_mask, message.logprobs)
    reward = message.reward
    rejected = _misformed(message, arrays, reward)
    if rejected is not None:
        rejected.lease_id = message.lease_id
        return rejected
    return _Opened(sent, message, arrays, reward)


def _misformed(
    message: trajectory_pb2.Trajectory, arrays: Arrays, reward: trajectory_pb2.Reward
) -> Rejected | None:
    if not _TRAJECTORY_ID.fullmatch(message.trajectory_id):
        return Rejected(
            RejectionCode.BAD_ID,
            f"trajectory_id is {message.trajectory_id[:40]!r}; expected 32 hexadecimal digits",
        )
    if message.task.index > _MAX_TASK_INDEX:
        return Rejected(
            RejectionCode.WRONG_TASK,
            f"task.index is {message.task.index}; expected at most {_MAX_TASK_INDEX}, as the ledger can hold",
        )
    num_tokens = len(arrays.loss_mask)
    if not len(arrays.token_ids) == len(arrays.logprobs) == 4 * num_tokens > 0:
        return Rejected(
            RejectionCode.BAD_LENGTHS,
            f"{len(arrays.token_ids)}, {len(arrays.logprobs)} and {num_tokens} bytes of token_ids, logprobs "
            "and loss_mask; expected 4, 4 and 1 a token, and at least one token",
        )
    try:
        codec.check_enums(message.finish_reason, reward)
    except ProtocolError as error:
        return Rejected(RejectionCode.BAD_REWARD, str(error))
    return None


def _submission(
    opened: _Opened, num_sampled: int, flaw: Rejected | None, tasks: dict[_TaskKey, Task]
) -> Submission:
    """tasks: those of the message so far, for the members of a group share one."""
    message, reward = opened.message, opened.reward
    spans = []
    for span in message.versions:
        version = span.version
        spans.append(VersionSpan(PolicyVersion(version.epoch, version.step), span.num_tokens))
    task = message.task
    key = (task.environment, task.split, task.index, task.seed)
    # By place, not by name, which would cost a microsecond more.
    return Submission(
        opened.sent.payload,
        opened.sent.checksum,
        message.trajectory_id,
        message.lease_id,
        tuple(spans),
        num_sampled,
        reward.value if reward.status == trajectory_pb2.REWARD_STATUS_VALID else math.nan,
        tasks.get(key) or tasks.setdefault(key, Task(*key)),
        message.observation_digest,
        flaw or span_flaw(spans, num_sampled) or _reward_flaw(message, reward),
    )


def span_flaw(spans: Sequence[VersionSpan], num_sampled: int) -> Rejected | None:
    """What is wrong with the versions of so many sampled tokens."""
    if len(spans) == 1 and spans[0].num_tokens == num_sampled > 0:
        return None
    lengths = [span.num_tokens for span in spans]
    covered = sum(lengths)
    if covered != num_sampled or 0 in lengths:
        return Rejected(
            RejectionCode.BAD_VERSIONS,
            f"version spans cover {covered} tokens; expected each of the {num_sampled} sampled, "
            "and no empty span",
        )
    if len(spans) > 1 and any(
        later.version <= earlier.version for earlier, later in itertools.pairwise(spans)
    ):
        names = ", ".join(str(span.version) for span in spans[:8])
        return Rejected(RejectionCode.BAD_VERSIONS, f"version spans run {names}; expected them to grow")
    return None


def _reward_flaw(message: trajectory_pb2.Trajectory, reward: trajectory_pb2.Reward) -> Rejected | None:
    if reward.status != trajectory_pb2.REWARD_STATUS_VALID or not math.isfinite(reward.value):
        got = codec.reward_from_wire(reward)
        return Rejected(
            RejectionCode.BAD_REWARD,
            f"reward is {got.value} with status {got.status}; expected a finite value with status valid",
        )
    metrics = message.metrics
    for name, measured in metrics.items() if metrics else ():
        if not math.isfinite(measured):
            return Rejected(
                RejectionCode.BAD_REWARD, f"metric {name!r} is {measured}; expected a finite number"
            )
    return None
