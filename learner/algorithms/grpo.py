"""Group-relative policy optimisation (Shao et al. 2024, "DeepSeekMath", section 4.1), asynchronous."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from learner.algorithms.aggregation import token_mean
from learner.algorithms.importance import (
    effective_sample_share,
    k3,
    log_ratio,
    ratio_health,
    truncated_weights,
)
from learner.algorithms.sums import share
from learner.algorithms.surrogate import clipped_surrogate

STD_EPSILON = 1e-6


def group_advantages(rewards_G: torch.Tensor, *, scale_by_std: bool) -> torch.Tensor:
    """How much better than its siblings each trajectory of a group did: r - mean(r), or that over std(r).

    rewards_G: [G] float64. Returns [G] float64. The standard deviation is the sample's
    (n - 1), of the centred rewards (never E[x^2] - E[x]^2, which cancels), plus 1e-6.
    Equal rewards, and a group of one, give exactly 0. Without the division this is
    Dr. GRPO's advantage (Liu et al. 2025).
    """
    if rewards_G.max() == rewards_G.min():
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    if not scale_by_std:
        return centred_G
    variance = centred_G.square().sum() / (rewards_G.numel() - 1)
    return centred_G / (variance.sqrt() + STD_EPSILON)


def grpo_loss(
    logprobs_S: torch.Tensor,
    proximal_S: torch.Tensor,
    behaviour_S: torch.Tensor,
    advantages_S: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    importance_cap: float,
    num_tokens: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The decoupled objective (Hilton et al. 2022; AReaL, Fu et al. 2025, eq. 5), truncated, as a token mean:

        -1/N sum_S  min(prox / mu, cap) * min(u A, clip(u) A)      u = pi / prox

    logprobs_S: [S] float32, log pi, with gradients. proximal_S, behaviour_S: [S] float32,
    log prox and log mu, constants. advantages_S: [S] float32. num_tokens: N, the sampled
    tokens of the whole update. Returns the row's share of the loss, and sums for `summarise`.
    """
    weights_S, off_policy_S = truncated_weights(proximal_S, behaviour_S, cap=importance_cap)
    step_S = log_ratio(logprobs_S, proximal_S.detach())
    losses_S, clipped_S = clipped_surrogate(step_S, advantages_S, clip_low=clip_low, clip_high=clip_high)
    loss = token_mean(weights_S * losses_S, num_tokens=num_tokens)
    sums = ratio_health(off_policy_S, advantages_S, cap=importance_cap)
    sums["clipped_sum"] = clipped_S.sum()
    sums["tokens_sum"] = advantages_S.new_tensor(advantages_S.numel(), dtype=torch.float64)
    return loss, sums


def mismatch(
    proximal_S: torch.Tensor, behaviour_S: torch.Tensor, same_version_S: torch.Tensor
) -> dict[str, torch.Tensor]:
    """KL between engine and trainer where both had the same weights: should be near 0, whatever the lag.

    same_version_S: [S] bool, the token was sampled by the version that is trained on.
    """
    kl_S = k3(log_ratio(proximal_S.detach(), behaviour_S))
    return {
        "mismatch_kl_sum": torch.where(same_version_S, kl_S, 0.0).sum(),
        "same_version_sum": same_version_S.sum(),
    }


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """What is reported of a step, from the sums over all of its tokens."""
    num_tokens = sums["tokens_sum"]
    report = {
        "ratio_mean": share(sums["ratio_sum"], num_tokens),
        "ratio_max": sums["ratio_max"],
        "ess": effective_sample_share(sums["ratio_sum"], sums["ratio_square_sum"], num_tokens),
        "kl": share(sums["kl_sum"], num_tokens),
        "entropy": share(sums["entropy_sum"], num_tokens),
        "clip_share": share(sums["clipped_sum"], num_tokens),
        "truncated_share_positive": share(sums["truncated_positive_sum"], num_tokens),
        "truncated_share_negative": share(sums["truncated_negative_sum"], num_tokens),
    }
    if sums["same_version_sum"]:
        report["mismatch_kl"] = sums["mismatch_kl_sum"] / sums["same_version_sum"]
    return report
