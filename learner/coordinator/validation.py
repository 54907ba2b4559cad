"""Is a submitted trajectory well-formed, and what was leased?

Everything that could poison a training step is refused here, with a code, before it
is stored. What comes too late or twice is well-formed; the scheduler decides on that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from penstock.errors import PenstockError
from penstock.trajectory import PolicyVersion, Task, VersionSpan


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
    CORRUPT = "corrupt"
    WRONG_VERSION = "wrong_version"


class Rejected(PenstockError):
    """A trajectory that is not kept."""

    def __init__(self, code: RejectionCode, message: str, *, lease_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.lease_id = lease_id
        """As the trajectory says, if it could be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the run's policy and sampling allow."""

    vocab_size: int
    max_sampled_tokens: int
    max_context: int


def check_versions(versions: Sequence[VersionSpan], published: Collection[PolicyVersion]) -> None:
    """Checks that every version was published in this run. Raises Rejected."""
    for span in versions:
        if span.version not in published:
            raise Rejected(RejectionCode.UNKNOWN_VERSION, f"version {span.version} was never published here")


def check_task(task: Task, leased: Task) -> None:
    """Checks that a trajectory is of the task that it was leased for. Raises Rejected."""
    if task is not leased and task != leased:
        raise Rejected(RejectionCode.WRONG_TASK, f"task is {task}; leased was {leased}")


def check_observation(digest: str, others: str | None) -> None:
    """Checks the first observation's digest against the group's other members', if any. Raises Rejected."""
    if others is not None and digest != others:
        raise Rejected(
            RejectionCode.OBSERVATION_DIFFERS,
            f"the first observation's digest is {digest!r}; the group's other members "
            f"have {others!r}: the environment does not give equal tasks equal observations",
        )
