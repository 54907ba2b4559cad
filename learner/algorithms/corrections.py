"""Weights and masks for tokens that another policy sampled.

    c = anchor / mu      anchor: the proximal policy, or the learner's where mu itself is the proximal one

Each takes the log-probabilities of anchor and mu (constants), the advantages, all [S],
and the row's sequences, and returns (weights_S, limited_S): what the token's surrogate
is multiplied by, and where the weight is not the plain one. *Weights* carry c itself, bounded;
*filters* are 1 or 0. Sequences are weighed by the *mean* of their log-ratios.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from learner.algorithms.ratios import log_ratio, sequence_ratio
from learner.algorithms.sequences import Sequences

Weighed = tuple[torch.Tensor, torch.Tensor]
Correction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequences], Weighed]


def uncorrected(
    anchor_S: torch.Tensor, behaviour_S: torch.Tensor, advantages_S: torch.Tensor, sequences: Sequences
) -> Weighed:
    """1 everywhere."""
    return torch.ones_like(behaviour_S), torch.zeros_like(behaviour_S, dtype=torch.bool)


def truncated(
    anchor_S: torch.Tensor,
    behaviour_S: torch.Tensor,
    advantages_S: torch.Tensor,
    sequences: Sequences,
    *,
    high: float,
) -> Weighed:
    """min(c, high) a token: truncated importance sampling (Ionides 2008; Espeholt et al. 2018, rho-bar)."""
    return _truncate(log_ratio(anchor_S, behaviour_S).exp(), high)


def truncated_sequence(
    anchor_S: torch.Tensor,
    behaviour_S: torch.Tensor,
    advantages_S: torch.Tensor,
    sequences: Sequences,
    *,
    high: float,
) -> Weighed:
    """min(s, high) for every token of a sequence, s = exp(mean log c)."""
    return _truncate(sequence_ratio(anchor_S, behaviour_S, sequences).exp(), high)


def masked(
    anchor_S: torch.Tensor,
    behaviour_S: torch.Tensor,
    advantages_S: torch.Tensor,
    sequences: Sequences,
    *,
    low: float,
    high: float,
) -> Weighed:
    """c where low <= c <= high, else 0, a token: IcePop (Ling team 2025)."""
    return _keep_between(log_ratio(anchor_S, behaviour_S).exp(), low, high)


def masked_sequence(
    anchor_S: torch.Tensor,
    behaviour_S: torch.Tensor,
    advantages_S: torch.Tensor,
    sequences: Sequences,
    *,
    low: float,
    high: float,
) -> Weighed:
    """s where low <= s <= high, else 0, for every token of a sequence, s = exp(mean log c)."""
    return _keep_between(sequence_ratio(anchor_S, behaviour_S, sequences).exp(), low, high)


def geometric_filter(
    anchor_S: torch.Tensor,
    behaviour_S: torch.Tensor,
    advantages_S: torch.Tensor,
    sequences: Sequences,
    *,
    low: float,
    high: float,
) -> Weighed:
    """1 where low < exp(mean log c) < high over the sequence, else 0: whole sequences are kept or left out."""
    ratio_S = sequence_ratio(anchor_S, behaviour_S, sequences).exp()
    keep_S = (ratio_S > low) & (ratio_S < high)
    return keep_S.to(ratio_S.dtype), ~keep_S


def total_variation_filter(
    anchor_S: torch.Tensor,
    behaviour_S: torch.Tensor,
    advantages_S: torch.Tensor,
    sequences: Sequences,
    *,
    threshold: float,
) -> Weighed:
    """0 where A > 0 and anchor - mu > threshold, or A < 0 and anchor - mu < -threshold: DPPO with total variation.

    A difference of probabilities, so that rare tokens, whose ratios run wild, stay.
    """
    moved_S = anchor_S.exp() - behaviour_S.exp()
    drop_S = ((advantages_S > 0) & (moved_S > threshold)) | ((advantages_S < 0) & (moved_S < -threshold))
    return (~drop_S).to(moved_S.dtype), drop_S


def second_moment_filter(log_ratios: NDArray[np.float64], *, threshold: float) -> NDArray[np.bool_]:
    """Leaves out the tokens of largest (log c)^2 until the mean over those kept is at most `threshold`: M2PO.

    Zheng et al. 2025, "Prosperity before Collapse". log_ratios: [tokens of
    the whole update] float64; unlike the others it looks at all rows at once. Returns
    what is kept: bool of the same length.
    """
    moments = np.square(log_ratios)
    order = np.argsort(moments, kind="stable")
    means = np.cumsum(moments[order]) / np.arange(1, len(order) + 1)
    keep = np.zeros(len(order), dtype=bool)
    keep[order[: np.searchsorted(means, threshold, side="right")]] = True
    return keep


def _truncate(ratio_S: torch.Tensor, high: float) -> Weighed:
    return ratio_S.clamp(max=high), ratio_S > high


def _keep_between(ratio_S: torch.Tensor, low: float, high: float) -> Weighed:
    outside_S = (ratio_S < low) | (ratio_S > high)
    return torch.where(outside_S, 0.0, ratio_S), outside_S
