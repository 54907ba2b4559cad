"""From one loss a token to the loss of a step."""

from __future__ import annotations

import torch


def token_mean(losses_S: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
    """This row's share of the mean over every sampled token of the update (DAPO, Yu et al. 2025, eq. 8).

    losses_S: [S] float32. num_tokens: sampled tokens of the *whole* update, over all rows
    and ranks, so that the sum over rows is the mean whatever the packing. A row without
    sampled tokens contributes 0 (and zero gradients).
    """
    return losses_S.sum() / max(num_tokens, 1)
