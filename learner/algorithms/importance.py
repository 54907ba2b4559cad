"""Correcting for tokens that another policy sampled.

mu     behaviour policy: sampled the token, at whatever version, in whatever engine
prox   proximal policy: the trainer's weights at the start of the step

Log-probabilities below LOG_FLOOR count as LOG_FLOOR, and log-ratios are clamped to
LOG_RATIO_BOUND either way, so that a token that one policy rules out (-inf) leaves
everything finite. NaN stays NaN, and is found by the step's check.
"""

from __future__ import annotations

import torch

LOG_FLOOR = -100.0
LOG_RATIO_BOUND = 20.0


def log_ratio(numerator_S: torch.Tensor, denominator_S: torch.Tensor) -> torch.Tensor:
    """log of numerator / denominator, from log-probabilities.

    Both: [S] float32, natural logarithms, -inf allowed. Returns [S] within
    +-LOG_RATIO_BOUND; the gradient is 0 where a bound holds.
    """
    difference_S = numerator_S.clamp(min=LOG_FLOOR) - denominator_S.clamp(min=LOG_FLOOR)
    return difference_S.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def truncated_weights(
    proximal_S: torch.Tensor, behaviour_S: torch.Tensor, *, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated importance sampling: w = min(prox / mu, cap) a token (Ionides 2008; Espeholt et al. 2018, rho-bar).

    Both inputs: [S] float32 log-probabilities. Returns (w_S, log(prox / mu)_S), without gradients.
    """
    log_ratio_S = log_ratio(proximal_S.detach(), behaviour_S)
    return log_ratio_S.exp().clamp(max=cap), log_ratio_S


def ratio_health(
    log_ratio_S: torch.Tensor, advantages_S: torch.Tensor, *, cap: float
) -> dict[str, torch.Tensor]:
    """Sums from which `summarise_ratios` tells how far apart two policies are.

    log_ratio_S: [S] float32, log(prox / mu) of tokens sampled from mu.
    advantages_S: [S] float32; truncated tokens are counted by its sign.
    """
    ratio_S = log_ratio_S.exp()
    truncated_S = ratio_S > cap
    zero = log_ratio_S.new_zeros(1)
    return {
        "ratio_sum": ratio_S.sum(),
        "ratio_square_sum": ratio_S.square().sum(),
        "ratio_max": torch.cat([ratio_S, zero]).max(),
        "kl_sum": k3(log_ratio_S).sum(),
        "truncated_positive_sum": (truncated_S & (advantages_S > 0)).sum(),
        "truncated_negative_sum": (truncated_S & (advantages_S < 0)).sum(),
    }


def k3(log_ratio_S: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(mu || prox) a token: r - 1 - log r, for r = prox / mu and tokens from mu.

    Never negative; 0 where the two agree. log_ratio_S: [S] float32.
    """
    return torch.expm1(log_ratio_S) - log_ratio_S


def effective_sample_share(ratio_sum: float, ratio_square_sum: float, num_tokens: float) -> float:
    """(sum r)^2 / (n sum r^2): 1 when all ratios are equal, 1/n when one outweighs the rest; 0 of nothing."""
    return ratio_sum**2 / (num_tokens * ratio_square_sum) if num_tokens and ratio_square_sum else 0.0
