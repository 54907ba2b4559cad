"""Which of a row's sampled tokens belong to which of its sequences.

S   sampled tokens of the row        N   its sequences
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """A row's sequences, as the tokens of each that are learned from."""

    index_S: torch.Tensor
    """[S] int64: the sequence of each token, 0 <= index < N."""
    lengths_N: torch.Tensor
    """[N] int64: tokens of each sequence."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | None = None) -> Sequences:
        """Sequences that stand one after another."""
        lengths_N = torch.tensor(lengths, dtype=torch.int64)
        on_device_N = lengths_N.to(device, non_blocking=True)
        index_S = torch.repeat_interleave(on_device_N, output_size=sum(lengths))
        return cls(index_S=index_S, lengths_N=on_device_N)

    def sum(self, values_S: torch.Tensor) -> torch.Tensor:
        """[S] to [N]: the sum over each sequence's tokens."""
        return values_S.new_zeros(len(self.lengths_N)).index_add(0, self.index_S, values_S)

    def mean(self, values_S: torch.Tensor) -> torch.Tensor:
        """[S] to [N]: the mean over each sequence's tokens; 0 for one without."""
        return self.sum(values_S) / self.lengths_N.clamp(min=1)

    def spread(self, values_N: torch.Tensor) -> torch.Tensor:
        """[N] to [S]: gives each token its sequence's value."""
        return values_N[self.index_S]
