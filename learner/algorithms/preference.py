"""Losses of preference pairs, from the log-probabilities of whole answers.

P   pairs of an update

    h = beta ((log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

_CERTAIN = -1e-6
"""A mean log-probability above this counts as this: log odds of certainty are infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """Sums of natural log-probabilities over the tokens of each answer: [P] float each."""

    chosen_P: torch.Tensor
    """log pi, with gradients."""
    rejected_P: torch.Tensor
    chosen_reference_P: torch.Tensor
    """log ref, constants; 0 for losses without a reference."""
    rejected_reference_P: torch.Tensor
    chosen_tokens_P: torch.Tensor
    """Tokens of each answer."""
    rejected_tokens_P: torch.Tensor

    @property
    def chosen_ratio(self) -> torch.Tensor:
        return self.chosen_P - self.chosen_reference_P

    @property
    def rejected_ratio(self) -> torch.Tensor:
        return self.rejected_P - self.rejected_reference_P

    @property
    def ratio(self) -> torch.Tensor:
        return self.chosen_ratio - self.rejected_ratio


PairLoss = Callable[[PairScores], torch.Tensor]
"""Loss of each pair: [P]."""


def sigmoid(pairs: PairScores, *, beta: float) -> torch.Tensor:
    """-log sigmoid(h): DPO (Rafailov et al. 2023, eq. 7)."""
    return -logsigmoid(beta * pairs.ratio)


def conservative(pairs: PairScores, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(h) - e log sigmoid(-h), where a share e of labels is wrong: cDPO (Mitchell 2023)."""
    h_P = beta * pairs.ratio
    return -(1 - label_smoothing) * logsigmoid(h_P) - label_smoothing * logsigmoid(-h_P)


def robust(pairs: PairScores, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """(-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e): unbiased under flips (Chowdhury et al. 2024)."""
    h_P = beta * pairs.ratio
    flipped_P = label_smoothing * logsigmoid(-h_P)
    return (flipped_P - (1 - label_smoothing) * logsigmoid(h_P)) / (1 - 2 * label_smoothing)


def hinge(pairs: PairScores, *, beta: float) -> torch.Tensor:
    """max(0, 1 - h): SLiC (Zhao et al. 2023), with DPO's reward."""
    return torch.relu(1 - beta * pairs.ratio)


def ipo(pairs: PairScores, *, beta: float) -> torch.Tensor:
    """(mean log-ratio of chosen less that of rejected, minus 1 / (2 beta))^2: IPO (Azar et al. 2023, eq. 17).

    Means over tokens, as its authors have it, so that the target doesn't depend on lengths.
    """
    chosen_P = pairs.chosen_ratio / pairs.chosen_tokens_P
    rejected_P = pairs.rejected_ratio / pairs.rejected_tokens_P
    return (chosen_P - rejected_P - 1 / (2 * beta)).square()


def simpo(pairs: PairScores, *, beta: float, margin: float) -> torch.Tensor:
    """-log sigmoid(beta (mean log pi(chosen) - mean log pi(rejected)) - margin): SimPO (Meng et al. 2024, eq. 6)."""
    chosen_P, rejected_P = _means(pairs)
    return -logsigmoid(beta * (chosen_P - rejected_P) - margin)


def orpo(pairs: PairScores, *, beta: float) -> torch.Tensor:
    """Cross entropy of the chosen answer - beta log sigmoid(log odds ratio): ORPO (Hong et al. 2024, eq. 6)."""
    chosen_P, rejected_P = _means(pairs)
    odds_P = (chosen_P - rejected_P) - (_log1mexp(chosen_P) - _log1mexp(rejected_P))
    return -chosen_P - beta * logsigmoid(odds_P)


def kto(pairs: PairScores, *, beta: float, kl: float) -> torch.Tensor:
    """1 - sigmoid(beta (r - kl)) of the chosen and 1 - sigmoid(beta (kl - r)) of the rejected, their mean: KTO.

    Ethayarajh et al. 2024, eq. 8, with r the log-ratio to the reference, both kinds
    weighed the same. kl: the divergence of pi from ref on answers to other prompts, a
    constant, at least 0.
    """
    gain_P = 1 - torch.sigmoid(beta * (pairs.chosen_ratio - kl))
    loss_P = 1 - torch.sigmoid(beta * (kl - pairs.rejected_ratio))
    return (gain_P + loss_P) / 2


def _means(pairs: PairScores) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs.chosen_P / pairs.chosen_tokens_P, pairs.rejected_P / pairs.rejected_tokens_P


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x < 0, without cancellation near 0."""
    x = x.clamp(max=_CERTAIN)
    near_0 = x > -0.6931472
    return torch.where(
        near_0, torch.log(-torch.expm1(torch.where(near_0, x, -1.0))), torch.log1p(-torch.exp(x))
    )
