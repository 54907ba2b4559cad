"""What is reported of a step: sums over a row's tokens, and the report made of their totals."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from learner.algorithms.divergence import excess
from learner.algorithms.ratios import log_ratio
from learner.algorithms.sums import share


def ratio_health(anchor_S: torch.Tensor, behaviour_S: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the policy is from the one that sampled, for r = anchor / mu over tokens of mu."""
    log_ratio_S = log_ratio(anchor_S, behaviour_S)
    ratio_S = log_ratio_S.exp()
    return {
        "ratio_sum": ratio_S.sum(),
        "ratio_square_sum": ratio_S.square().sum(),
        "ratio_max": torch.cat([ratio_S, ratio_S.new_zeros(1)]).max(),
        "kl_sum": excess(log_ratio_S).sum(),
    }


def limit_health(limited_S: torch.Tensor, advantages_S: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens that a correction truncated or masked, by the sign of their advantage."""
    return {
        "limited_positive_sum": (limited_S & (advantages_S > 0)).sum(),
        "limited_negative_sum": (limited_S & (advantages_S < 0)).sum(),
    }


def mismatch(
    current_S: torch.Tensor, behaviour_S: torch.Tensor, same_version_S: torch.Tensor
) -> dict[str, torch.Tensor]:
    """KL between engine and trainer where both had the same weights: should be near 0, whatever the lag.

    same_version_S: [S] bool, the token was sampled by the version that is trained on.
    """
    kl_S = excess(log_ratio(current_S.detach(), behaviour_S))
    return {
        "mismatch_kl_sum": torch.where(same_version_S, kl_S, 0.0).sum(),
        "same_version_sum": same_version_S.sum(),
    }


def effective_sample_share(ratio_sum: float, ratio_square_sum: float, num_tokens: float) -> float:
    """(sum r)^2 / (n sum r^2): 1 when all ratios are equal, 1/n when one outweighs the rest; 0 of nothing."""
    return ratio_sum**2 / (num_tokens * ratio_square_sum) if num_tokens and ratio_square_sum else 0.0


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """The report of a step, from the sums over all of its tokens."""
    num_tokens = sums["tokens_sum"]
    report = {
        "ratio_mean": share(sums["ratio_sum"], num_tokens),
        "ratio_max": sums["ratio_max"],
        "ess": effective_sample_share(sums["ratio_sum"], sums["ratio_square_sum"], num_tokens),
        "kl": share(sums["kl_sum"], num_tokens),
        "entropy": share(sums["entropy_sum"], num_tokens),
        "clip_share": share(sums["clipped_sum"], num_tokens),
        "masked_share_positive": share(sums["limited_positive_sum"], num_tokens),
        "masked_share_negative": share(sums["limited_negative_sum"], num_tokens),
    }
    if sums["same_version_sum"]:
        report["mismatch_kl"] = sums["mismatch_kl_sum"] / sums["same_version_sum"]
    if "reference_kl_sum" in sums:
        report["reference_kl"] = share(sums["reference_kl_sum"], num_tokens)
    return report
