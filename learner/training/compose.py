"""From a recipe's names to the functions of learner/algorithms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from learner.algorithms import advantages, aggregation, corrections, divergence, ratios, surrogates
from learner.algorithms.advantages import Rewards
from learner.algorithms.policy_gradient import Parts
from learner.algorithms.recipe import Advantage, Aggregation, Clip, Correction, Divergence, Level, Recipe

ADVANTAGES: dict[Advantage, Callable[[Rewards], list[torch.Tensor]]] = {
    Advantage.GROUP_MEAN: advantages.group_mean,
    Advantage.GROUP_STD: advantages.group_std,
    Advantage.LEAVE_ONE_OUT: advantages.leave_one_out,
    Advantage.BATCH_STD: advantages.batch_std,
    Advantage.GROUP_MEAN_BATCH_STD: advantages.group_mean_batch_std,
}


def compose_parts(recipe: Recipe) -> Parts:
    """The loss of a row."""
    return Parts(
        ratio=ratios.sequence_ratio if recipe.ratio is Level.SEQUENCE else ratios.token_ratio,
        surrogate=_surrogate(recipe),
        correction=_correction(recipe),
        divergence=_divergence(recipe.kl),
        kl_coefficient=recipe.kl_coefficient,
    )


def compose_aggregation(recipe: Recipe, *, max_tokens: int) -> aggregation.Aggregation:
    """max_tokens: the run's longest answer."""
    match recipe.aggregation:
        case Aggregation.TOKEN_MEAN:
            return aggregation.token_mean
        case Aggregation.SEQUENCE_MEAN:
            return aggregation.sequence_mean
        case Aggregation.SEQUENCE_SUM:
            return aggregation.sequence_sum
        case Aggregation.CONSTANT_LENGTH:
            constant = recipe.aggregation_tokens or max_tokens
            return partial(aggregation.constant_length, num_tokens=constant)


def _surrogate(recipe: Recipe) -> surrogates.Surrogate:
    match recipe.clip:
        case Clip.NONE:
            return surrogates.unclipped
        case Clip.CISPO:
            return partial(surrogates.cispo, clip_high=recipe.clip_high)
        case Clip.PPO:
            return partial(
                surrogates.clipped,
                clip_low=recipe.clip_low,
                clip_high=recipe.clip_high,
                dual_clip=recipe.dual_clip,
            )


def _correction(recipe: Recipe) -> corrections.Correction:
    low, high, threshold = recipe.correction_low, recipe.correction_high, recipe.correction_threshold
    match recipe.correction:
        case Correction.TRUNCATE:
            return partial(corrections.truncated, high=high)
        case Correction.TRUNCATE_SEQUENCE:
            return partial(corrections.truncated_sequence, high=high)
        case Correction.MASK:
            return partial(corrections.masked, low=low, high=high)
        case Correction.MASK_SEQUENCE:
            return partial(corrections.masked_sequence, low=low, high=high)
        case Correction.GEOMETRIC:
            return partial(corrections.geometric_filter, low=low, high=high)
        case Correction.TOTAL_VARIATION:
            return partial(corrections.total_variation_filter, threshold=threshold)
        case Correction.NONE | Correction.SECOND_MOMENT:  # the latter looks at all rows at once
            return corrections.uncorrected


def _divergence(kl: Divergence) -> divergence.Divergence | None:
    """k1 is no loss: it is taken off the rewards."""
    return {Divergence.K2: divergence.k2, Divergence.K3: divergence.k3}.get(kl)
