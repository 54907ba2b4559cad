"""What an engine is: token ids in; token ids, log-probabilities and versions out.

An engine generates under one installed version at a time and may switch between any
two decode steps, in the middle of every running sequence, without dropping one. It
never sees text. `tests/conformance` holds the suite that every engine passes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from penstock.errors import EngineFault
from penstock.trajectory import PolicyVersion, Sampling, TokenIds
from penstock.weights.staged import StagedWeights


class StopReason(StrEnum):
    STOP = "stop"
    """A stop token was sampled; it is the last token of the turn."""
    LENGTH = "length"
    """The request's or the engine's limit of tokens was reached."""
    ABORTED = "aborted"
    """`abort` was called, or the engine stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    request_id: str
    prompt_ids: TokenIds
    """[P] int32; everything said so far, sampled or not."""
    sampling: Sampling
    """`max_tokens` bounds this request."""


def check_prompt(request: GenerationRequest, vocab_size: int) -> None:
    """Raises EngineFault for a prompt that no engine can go on from."""
    prompt = request.prompt_ids
    if prompt.ndim != 1 or prompt.size == 0 or prompt.dtype != np.int32:
        raise EngineFault(
            f"prompt of {prompt.dtype}{list(prompt.shape)}; expected int32 with a token or more"
        )
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise EngineFault(
            f"prompt holds token ids from {prompt.min()} to {prompt.max()}; expected 0 to {vocab_size - 1}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChunk:
    """One or more tokens of a request, sampled by one version."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural logarithms, under the sampling settings: after temperature, top-k and top-p."""
    version: PolicyVersion
    stop_reason: StopReason | None = None
    """Set in the last chunk only, which may hold no tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallReport:
    version: PolicyVersion
    digest: str
    """Over the tensors as installed; equals the manifest's."""
    pause_seconds: float
    """For how long no decode step could run."""
    tensors_seconds: float
    """Of them, for switching the tensors alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    num_running: int
    num_waiting: int
    num_tokens: int
    """Sampled since the engine started."""
    tokens_per_second: float
    """Over the last few seconds."""
    num_installs: int
    max_install_seconds: float


class Engine(Protocol):
    """Generates with weights that may change between any two tokens."""

    @property
    def verifies(self) -> bool:
        """Whether `install` checks the digest of its own copy, so that nobody need do it before."""
        ...

    @property
    def num_slots(self) -> int:
        """Sequences decoded at once."""
        ...

    @property
    def max_context(self) -> int:
        """Tokens that prompt and completion may hold together."""
        ...

    @property
    def installed(self) -> PolicyVersion | None:
        """The version that the next token comes from; None before the first install."""
        ...

    async def start(self) -> None:
        """Makes the engine ready to install weights. Raises ConfigError, EngineFault."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Streams a completion. Waits while no version is installed. Raises EngineFault.

        Closing the iterator early aborts the request.
        """
        ...

    async def install(self, staged: StagedWeights) -> InstallReport:
        """Switches to a version between two decode steps. Unless the engine verifies, it must be verified.

        Either every tensor is switched or none is. Raises WeightTransferError.
        """
        ...

    def stats(self) -> EngineStats: ...

    async def stop(self) -> None:
        """Ends every request with ABORTED and frees the engine. May be called twice."""
        ...
