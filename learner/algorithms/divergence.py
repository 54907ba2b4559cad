"""Distance from a reference policy, estimated from the sampled token alone (Schulman 2020, "Approximating KL").

For tokens sampled from the learner policy, d = log ref - log pi. Each: [S] to [S].
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from learner.algorithms.ratios import log_ratio

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logprobs_S, reference_S) to an estimate a token, with gradients."""


def k1(logprobs_S: torch.Tensor, reference_S: torch.Tensor) -> torch.Tensor:
    """-d: without bias, but of high variance; as a *loss* its expected gradient is 0, so it belongs into rewards."""
    return log_ratio(logprobs_S, reference_S)


def k2(logprobs_S: torch.Tensor, reference_S: torch.Tensor) -> torch.Tensor:
    """d^2 / 2: biased in value, but on-policy its gradient is that of KL(pi || ref)."""
    return log_ratio(logprobs_S, reference_S).square() / 2


def k3(logprobs_S: torch.Tensor, reference_S: torch.Tensor) -> torch.Tensor:
    """e^d - 1 - d: without bias, never negative (GRPO, Shao et al. 2024, eq. 4)."""
    return excess(log_ratio(reference_S, logprobs_S))


def excess(log_ratio_S: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r of a log-ratio: averages to KL(sampler || numerator) over tokens of r's denominator."""
    return torch.expm1(log_ratio_S) - log_ratio_S
