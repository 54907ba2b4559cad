"""Drawing the next token of many sequences at once.

Shapes: B sequences, V vocabulary.

The random numbers are counter-based: token i of a sequence uses one uniform number that
is a function of the sequence's seed and of i alone. So the same seed and weights give
the same tokens, whatever else runs in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingBatch:
    """Each sequence's settings. None where all have the neutral one, which then costs nothing."""

    uniforms_B1: Tensor
    """[B, 1] float32, in [0, 1)."""
    temperature_B1: Tensor | None = None
    """[B, 1] float32, above 0; 1 for greedy sequences."""
    top_p_B1: Tensor | None = None
    """[B, 1] float32; 1 for greedy sequences."""
    top_k_B1: Tensor | None = None
    """[B, 1] int64, at least 1; V for greedy sequences and those that keep all."""
    greedy_B1: Tensor | None = None
    """[B, 1] bool."""


def sample(logits_BV: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Draws one token a sequence, by inversion of the cumulative distribution.

    logits_BV: [B, V], of any floating dtype; the computation is in float32.
    Returns tokens_B [B] int64 and logprobs_B [B] float32: the natural logarithm of the
    token's probability after temperature, then top-k, then top-p. Greedy sequences take
    the likeliest token, with its log-probability at temperature 1.
    """
    logits_BV = logits_BV.float()
    if batch.temperature_B1 is not None:
        logits_BV = logits_BV / batch.temperature_B1
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    order_BV = None
    if batch.top_p_B1 is not None or batch.top_k_B1 is not None:
        logprobs_BV, order_BV = _keep_likeliest(logprobs_BV, batch.top_k_B1, batch.top_p_B1)
    chosen_B1 = _invert(logprobs_BV, batch.uniforms_B1)
    if batch.greedy_B1 is not None:
        chosen_B1 = torch.where(batch.greedy_B1, logprobs_BV.argmax(dim=-1, keepdim=True), chosen_B1)
    logprobs_B = logprobs_BV.gather(-1, chosen_B1).squeeze(-1).clamp(max=0.0)
    tokens_B1 = chosen_B1 if order_BV is None else order_BV.gather(-1, chosen_B1)
    return tokens_B1.squeeze(-1), logprobs_B


def uniforms(seeds_B: NDArray[np.uint64], counters_B: NDArray[np.int64]) -> NDArray[np.float32]:
    """[B] float32 in [0, 1): element `counter` of the sequence that `seed` names.

    SplitMix64 (Steele, Lea & Flood 2014), seeded with a mixed seed, so that neighbouring
    seeds have unrelated sequences. The upper 24 bits fill a float32's significand.
    """
    with np.errstate(over="ignore"):
        states_B = _mix(seeds_B + _GOLDEN) + _GOLDEN * (counters_B.astype(np.uint64) + np.uint64(1))
        bits_B = _mix(states_B) >> np.uint64(40)
    return bits_B.astype(np.float32) * np.float32(2.0**-24)


def _invert(logprobs_BV: Tensor, uniforms_B1: Tensor) -> Tensor:
    """[B, 1] int64: the first index at which the cumulative probability exceeds u times the total.

    A token of probability 0 adds nothing to the sum, so it is never the first; and u is at
    most 1 - 2^-24, so that u times the total is below the total in float32 too.
    """
    cumulative_BV = logprobs_BV.exp().cumsum(dim=-1)
    return torch.searchsorted(cumulative_BV, uniforms_B1 * cumulative_BV[:, -1:], right=True)


def _keep_likeliest(
    logprobs_BV: Tensor, top_k_B1: Tensor | None, top_p_B1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sorts by falling probability and renormalises what top-k, then top-p, keep.

    Returns log-probabilities [B, V], -inf where dropped, and the token of each place [B, V].
    """
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    if top_k_B1 is not None:
        ranks_V = torch.arange(sorted_BV.shape[-1], device=sorted_BV.device)
        sorted_BV = sorted_BV.masked_fill(ranks_V >= top_k_B1, -torch.inf).log_softmax(dim=-1)
    if top_p_B1 is not None:
        probs_BV = sorted_BV.exp()
        mass_before_BV = probs_BV.cumsum(dim=-1) - probs_BV
        # The likeliest has nothing before it and stays. Rows that keep all are not rounded away.
        dropped_BV = (mass_before_BV >= top_p_B1) & (top_p_B1 < 1)
        sorted_BV = sorted_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(dim=-1)
    return sorted_BV, order_BV


def _mix(state_B: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function."""
    state_B = (state_B ^ (state_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state_B = (state_B ^ (state_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state_B ^ (state_B >> np.uint64(31))
