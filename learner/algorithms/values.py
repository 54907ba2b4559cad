"""The loss of a critic."""

from __future__ import annotations

import torch


def value_loss(
    values_S: torch.Tensor, targets_S: torch.Tensor, *, num_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """1/N sum_S (V - target)^2 / 2 over sampled tokens (Schulman et al. 2017, eq. 9, without clipping).

    values_S: [S], with gradients. targets_S: [S] constants. num_tokens: N, sampled tokens of
    the whole update. Returns the row's share of the loss, and sums for `explained_share`.
    """
    errors_S = values_S - targets_S
    sums = {"value_error_square_sum": errors_S.square().sum()}
    return errors_S.square().sum() / 2 / max(num_tokens, 1), sums


def explained_share(error_square_mean: float, target_variance: float) -> float:
    """1 - E[(V - target)^2] / Var(target): 1 for a perfect critic, 0 for the best constant, and for equal targets."""
    return 1.0 - error_square_mean / target_variance if target_variance > 0 else 0.0
