"""What becomes of rewards before they are compared. Imports no torch: the coordinator uses it too."""

from __future__ import annotations

from collections.abc import Sequence


def is_informative(rewards: Sequence[float]) -> bool:
    """False if all rewards of a group are equal, so that every advantage would be 0 (DAPO, Yu et al. 2025, eq. 11)."""
    return min(rewards) != max(rewards)


def overlong_penalty(num_sampled: int, *, max_tokens: int, buffer_tokens: int, scale: float) -> float:
    """Added to the reward of an answer that comes near its limit (DAPO, Yu et al. 2025, eq. 13); 0 or negative.

    0 up to max_tokens - buffer_tokens sampled tokens, then falling in a line to -scale at max_tokens.
    """
    over = num_sampled - (max_tokens - buffer_tokens)
    return -scale * min(max(over / buffer_tokens, 0.0), 1.0)
