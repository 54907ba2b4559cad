"""A policy gradient as a composition of parts:

    loss = sum_S  weight_S ( correction(anchor / mu) surrogate(ratio(pi / prox), A)  +  beta KL(pi, ref) )

`weight` comes from aggregation.py, so that the sum over all rows is the loss of the update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from learner.algorithms.corrections import Correction
from learner.algorithms.divergence import Divergence
from learner.algorithms.health import limit_health, ratio_health
from learner.algorithms.ratios import Ratio
from learner.algorithms.sequences import Sequences
from learner.algorithms.surrogates import Surrogate


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a loss is made of."""

    ratio: Ratio
    surrogate: Surrogate
    correction: Correction
    divergence: Divergence | None = None
    """None: no reference policy."""
    kl_coefficient: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTerms:
    """A row's sampled tokens. Log-probabilities are natural, and all but `logprobs_S` are constants."""

    logprobs_S: torch.Tensor
    """[S] log pi, with gradients."""
    proximal_S: torch.Tensor
    """[S] log prox: what the ratio divides by."""
    anchor_S: torch.Tensor
    """[S] whose distance from mu is corrected: prox, or pi where mu itself is prox."""
    behaviour_S: torch.Tensor
    """[S] log mu."""
    advantages_S: torch.Tensor
    weights_S: torch.Tensor
    """[S] what each token counts for in the loss of the update."""
    keep_S: torch.Tensor | None = None
    """[S] bool: what a filter over the whole update kept; None for all."""
    reference_S: torch.Tensor | None = None
    """[S] log ref; only with a divergence."""
    sequences: Sequences


def policy_gradient_loss(row: RowTerms, parts: Parts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A row's share of the update's loss, and the sums of its report. A row without tokens gives 0."""
    log_ratio_S = parts.ratio(row.logprobs_S, row.proximal_S, row.sequences)
    losses_S, clipped_S = parts.surrogate(log_ratio_S, row.logprobs_S, row.advantages_S)
    corrections_S, limited_S = parts.correction(
        row.anchor_S, row.behaviour_S, row.advantages_S, row.sequences
    )
    losses_S = corrections_S * losses_S
    if row.keep_S is not None:
        losses_S, limited_S = torch.where(row.keep_S, losses_S, 0.0), limited_S | ~row.keep_S
    sums = ratio_health(row.anchor_S, row.behaviour_S) | limit_health(limited_S, row.advantages_S)
    sums["clipped_sum"] = clipped_S.sum()
    sums["tokens_sum"] = torch.ones_like(row.advantages_S, dtype=torch.float64).sum()
    if parts.divergence is not None and row.reference_S is not None:
        divergence_S = parts.divergence(row.logprobs_S, row.reference_S)
        losses_S = losses_S + parts.kl_coefficient * divergence_S
        sums["reference_kl_sum"] = divergence_S.sum()
    return (row.weights_S * losses_S).sum(), sums
