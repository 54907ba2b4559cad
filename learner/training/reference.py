"""The reference policy: the one that the run started from, without a second copy on the device.

Where adapters are trained it is the policy without them, and there is no copy at all. Else its
weights wait in host memory, each rank's own part. To score, they change places with the
learner's for the length of one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from learner.training.adapters import without_adapters
from learner.training.packing import TokenSequence
from learner.training.parallel import local
from learner.training.updater import Updater


class Reference:
    """Remembers the updater's policy as it is when this is made."""

    def __init__(self, updater: Updater) -> None:
        self._updater = updater
        self._weights = self._copy() if updater.policy.adapters is None else []

    def score(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float32]]:
        """log ref of each sequence's sampled tokens: [S] float32 each. Every rank calls it."""
        adapted = self._updater.policy.adapters is not None
        with without_adapters(self._updater.policy) if adapted else self._in_place():
            return self._updater.score(sequences)

    def _copy(self) -> list[torch.Tensor]:
        return [local(p.detach()).cpu().clone() for p in self._updater.policy.parameters()]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        learner = self._copy()
        self._load(self._weights)
        try:
            yield
        finally:
            self._load(learner)

    def _load(self, weights: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, values in zip(self._updater.policy.parameters(), weights, strict=True):
                local(parameter.detach()).copy_(values)
