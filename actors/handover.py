"""Going on from what another actor played: the recorded part of a rollout, read from its start.

    first observation | turn | observation | turn | ...

An environment is reset with the same task and seed and gets the recorded actions again.
That is right only if it answers as it did, token for token; otherwise `HandoverMismatch`
ends the attempt, and the rollout begins anew.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from penstock.errors import PenstockError
from penstock.trajectory import Partial, PolicyVersion, TokenIds


class HandoverMismatch(PenstockError):
    """The environment does not answer as it did: what was played elsewhere cannot be gone on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTurn:
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[PolicyVersion, ...]
    finished: bool
    stopped: bool
    """The policy ended the turn itself."""


class _Run(NamedTuple):
    """Tokens start .. stop - 1 are all sampled, or none is."""

    sampled: bool
    start: int
    stop: int


class Recorded:
    """A partial rollout, taken piece by piece. Without one there is nothing to take."""

    def __init__(self, partial: Partial | None) -> None:
        self._partial = partial
        self._versions: list[PolicyVersion] = []
        self._runs: list[_Run] = []
        self._num_turns = 0
        if partial is not None:
            self._versions = [span.version for span in partial.versions for _ in range(span.num_tokens)]
            self._runs = _runs(partial)

    @property
    def is_over(self) -> bool:
        """Everything recorded was taken."""
        return not self._runs

    def check_start(self, *, version: str, digest: str, observation_digest: str) -> None:
        """Compares the environment and its first observation with the recorded ones. Raises HandoverMismatch."""
        partial = self._partial
        if partial is None:
            return
        recorded = (partial.environment_version, partial.environment_digest, partial.observation_digest)
        if recorded != (version, digest, observation_digest):
            raise HandoverMismatch(
                f"environment {version} {digest[:12]} begins with observation {observation_digest[:12]}; recorded "
                f"were {recorded[0]} {recorded[1][:12]} and {recorded[2][:12]}"
            )

    def check_observation(self, token_ids: TokenIds) -> None:
        """Takes the next recorded observation, and compares it. Raises HandoverMismatch."""
        if self._partial is None or self.is_over:
            return
        run = self._runs.pop(0)
        if run.sampled or not np.array_equal(self._partial.token_ids[run.start : run.stop], token_ids):
            raise HandoverMismatch(
                f"observation {self._num_turns} is another than the one recorded, of {run.stop - run.start} tokens"
            )

    def check_over(self) -> None:
        """The episode is over. Raises HandoverMismatch if more is recorded of it."""
        if not self.is_over:
            raise HandoverMismatch(f"the episode ended after turn {self._num_turns}; more was recorded of it")

    def next_turn(self) -> RecordedTurn | None:
        """Takes the next recorded turn; None if there is none. Raises HandoverMismatch."""
        if self._partial is None or self.is_over:
            return None
        partial, run = self._partial, self._runs.pop(0)
        if not run.sampled:
            raise HandoverMismatch(f"an observation was recorded where turn {self._num_turns} was due")
        num_tokens = run.stop - run.start
        versions, self._versions = self._versions[:num_tokens], self._versions[num_tokens:]
        finished = self._num_turns < partial.num_turns
        cut = partial.cut and self._num_turns == partial.num_turns - 1
        self._num_turns += finished
        return RecordedTurn(
            token_ids=tuple(partial.token_ids[run.start : run.stop].tolist()),
            logprobs=tuple(partial.logprobs[run.start : run.stop].tolist()),
            versions=tuple(versions),
            finished=finished,
            stopped=finished and not cut,
        )


def _runs(partial: Partial) -> list[_Run]:
    mask_t = partial.loss_mask
    edges = [0, *(np.flatnonzero(np.diff(mask_t)) + 1).tolist(), len(mask_t)]
    return [_Run(bool(mask_t[start]), start, stop) for start, stop in itertools.pairwise(edges)]
