"""The objective of one token, as a loss: what an update may gain from it, and where that ends.

Each takes the log-ratio log u of learner to proximal policy, through which the gradient
flows, the learner's log-probabilities and the advantages, all [S]; and returns
(losses_S, clipped_S): [S] float, and [S] bool where a bound holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from learner.algorithms.ratios import LOG_FLOOR

Surrogate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def clipped(
    log_ratio_S: torch.Tensor,
    logprobs_S: torch.Tensor,
    advantages_S: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with separate bounds (DAPO, Yu et al. 2025, eq. 10).

        -min(u A, clip(u, 1 - clip_low, 1 + clip_high) A)

    With dual_clip = c > 1 the loss of a negative advantage is at most c |A| (Ye et al.
    2020); 0 leaves it unbounded. Where a bound holds the token's gradient is 0.
    """
    ratio_S = log_ratio_S.exp()
    bounded_S = ratio_S.clamp(1.0 - clip_low, 1.0 + clip_high)
    free_S, held_S = ratio_S * advantages_S, bounded_S * advantages_S
    losses_S, clipped_S = -torch.minimum(free_S, held_S), held_S < free_S
    if dual_clip:
        worst_S = -dual_clip * advantages_S
        over_S = (advantages_S < 0) & (losses_S > worst_S)
        losses_S, clipped_S = torch.where(over_S, worst_S, losses_S), clipped_S | over_S
    return losses_S, clipped_S


def cispo(
    log_ratio_S: torch.Tensor, logprobs_S: torch.Tensor, advantages_S: torch.Tensor, *, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-sg(min(u, 1 + clip_high)) A log pi: CISPO (MiniMax 2025, "MiniMax-M1", eq. 4).

    The weight is bounded, not the gradient: every token keeps one.
    """
    ratio_S = log_ratio_S.detach().exp()
    weights_S = ratio_S.clamp(max=1.0 + clip_high)
    losses_S = -weights_S * advantages_S * logprobs_S.clamp(min=LOG_FLOOR)
    return losses_S, ratio_S > 1.0 + clip_high


def unclipped(
    log_ratio_S: torch.Tensor, logprobs_S: torch.Tensor, advantages_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-u A: importance-weighted REINFORCE (Williams 1992); where prox is pi, its gradient is -A grad log pi."""
    return -log_ratio_S.exp() * advantages_S, torch.zeros_like(log_ratio_S, dtype=torch.bool)
