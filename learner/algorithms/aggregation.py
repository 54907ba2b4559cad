"""From one loss a token to the loss of an update: what each token of each sequence counts for.

Each takes the sampled tokens of every sequence of the *whole* update, over all rows and
ranks, [N] int64, and returns the weight of each sequence's tokens, [N] float64. Summed
over rows, the weighted losses are the mean that is named, whatever the packing. Masked
tokens count in the normaliser.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Lengths = NDArray[np.int64]
Aggregation = Callable[[Lengths], NDArray[np.float64]]


def token_mean(lengths_N: Lengths) -> NDArray[np.float64]:
    """1 / all tokens: every token counts the same (DAPO, Yu et al. 2025, eq. 8)."""
    return np.full(len(lengths_N), 1.0 / max(int(lengths_N.sum()), 1))


def sequence_mean(lengths_N: Lengths) -> NDArray[np.float64]:
    """1 / (sequences |y|): every sequence counts the same, tokens of long ones less (GRPO, Shao et al. 2024)."""
    return 1.0 / (max(len(lengths_N), 1) * np.maximum(lengths_N, 1))


def sequence_sum(lengths_N: Lengths) -> NDArray[np.float64]:
    """1 / sequences: the log-probability of a whole answer is what counts (REINFORCE, RLOO)."""
    return np.full(len(lengths_N), 1.0 / max(len(lengths_N), 1))


def constant_length(lengths_N: Lengths, *, num_tokens: int) -> NDArray[np.float64]:
    """1 / (sequences num_tokens), for a constant such as the longest answer (Dr. GRPO, Liu et al. 2025)."""
    return np.full(len(lengths_N), 1.0 / (max(len(lengths_N), 1) * num_tokens))
