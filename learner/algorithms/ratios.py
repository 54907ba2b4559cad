"""How much likelier one policy makes what another sampled.

mu     behaviour policy: sampled the token, at whatever version, in whatever engine
prox   proximal policy: what an update must not go far from
pi     learner policy: being updated

Log-probabilities below LOG_FLOOR count as LOG_FLOOR, and log-ratios of a token are
clamped to LOG_RATIO_BOUND either way, so that a token that one policy rules out (-inf)
leaves everything finite. NaN stays NaN, and is found by the step's check.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from learner.algorithms.sequences import Sequences

LOG_FLOOR = -100.0
LOG_RATIO_BOUND = 20.0

Ratio = Callable[[torch.Tensor, torch.Tensor, Sequences], torch.Tensor]
"""(numerator_S, denominator_S, sequences) to a log-ratio a token: [S]."""


def log_ratio(numerator_S: torch.Tensor, denominator_S: torch.Tensor) -> torch.Tensor:
    """log of numerator / denominator, from log-probabilities.

    Both: [S] float, natural logarithms, -inf allowed. Returns [S] within
    +-LOG_RATIO_BOUND; the gradient is 0 where a bound holds.
    """
    difference_S = numerator_S.clamp(min=LOG_FLOOR) - denominator_S.clamp(min=LOG_FLOOR)
    return difference_S.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def token_ratio(numerator_S: torch.Tensor, denominator_S: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Each token by itself (PPO, GRPO): [S] log-ratios."""
    return log_ratio(numerator_S, denominator_S)


def sequence_ratio(
    numerator_S: torch.Tensor, denominator_S: torch.Tensor, sequences: Sequences
) -> torch.Tensor:
    """log s, s = (numerator(y) / denominator(y))^(1/|y|), for every token of y: GSPO (Zheng et al. 2025, eq. 7).

    The *mean* of the token's log-ratios. Their sum would grow with the length until
    every long answer is clipped or weighs nothing.
    """
    return sequences.spread(sequences.mean(log_ratio(numerator_S, denominator_S)))


def interpolated_proximal(
    logprobs_S: torch.Tensor, behaviour_S: torch.Tensor, lags_S: torch.Tensor
) -> torch.Tensor:
    """log prox = log mu + lag / (lag + 1) (log pi - log mu): A-3PO's stand-in for a proximal policy.

    The versions from mu to the one being made lie on a line, and prox is the last before
    it; a token of lag 0 gets mu itself. lags_S: [S], versions. Returns [S] constants.
    """
    share_S = lags_S / (lags_S + 1.0)
    return behaviour_S + share_S * log_ratio(logprobs_S.detach(), behaviour_S)
