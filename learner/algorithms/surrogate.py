"""The clipped surrogate objective."""

from __future__ import annotations

import torch


def clipped_surrogate(
    log_ratio_S: torch.Tensor, advantages_S: torch.Tensor, *, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with separate bounds (DAPO, Yu et al. 2025, eq. 10).

        -min(u A, clip(u, 1 - clip_low, 1 + clip_high) A)      u = pi_learner / pi_proximal

    log_ratio_S: [S] float32, log u; the gradient flows through it.
    advantages_S: [S] float32, constant over a trajectory's tokens.
    Returns (losses_S, clipped_S): [S] float32, and [S] bool where the bound holds and
    the token's gradient is 0.
    """
    ratio_S = log_ratio_S.exp()
    bounded_S = ratio_S.clamp(1.0 - clip_low, 1.0 + clip_high)
    free_S, held_S = ratio_S * advantages_S, bounded_S * advantages_S
    return -torch.minimum(free_S, held_S), held_S < free_S
