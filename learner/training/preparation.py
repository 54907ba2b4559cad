"""From a batch of groups to what the loss needs of each trajectory, on the host.

S   sampled tokens of one trajectory
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from learner.algorithms.filters import overlong_penalty
from learner.algorithms.recipe import Recipe
from learner.training.batch import Batch
from learner.training.compose import ADVANTAGES
from learner.training.packing import TokenSequence
from penstock.trajectory import PolicyVersion, Trajectory

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One trajectory, as constants of the step."""

    sequence: TokenSequence
    behaviour_S: Floats
    advantage_S: Floats
    lag_S: Floats
    """Versions between the one that sampled the token and the one trained on."""
    same_version_S: NDArray[np.bool_]


def token_sequence(trajectory: Trajectory) -> TokenSequence:
    return TokenSequence(token_ids=trajectory.token_ids, loss_mask=trajectory.loss_mask)


def behaviour_logprobs(trajectory: Trajectory) -> Floats:
    """Of the sampled tokens. Raises ValueError if any is missing: none is ever made up."""
    num_tokens = len(trajectory.loss_mask)
    if len(trajectory.logprobs) != num_tokens:
        raise ValueError(
            f"trajectory {trajectory.trajectory_id} has {len(trajectory.logprobs)} log-probabilities for "
            f"{num_tokens} tokens"
        )
    return token_sequence(trajectory).sampled(trajectory.logprobs).astype(np.float32)


def shaped_rewards(batch: Batch, recipe: Recipe, *, max_tokens: int) -> list[NDArray[np.float64]]:
    """Rewards of each group, less what overlong answers lose: [G] float64 each."""
    return [
        np.array([_shaped(trajectory, recipe, max_tokens) for trajectory in group.trajectories])
        for group in batch.groups
    ]


def _shaped(trajectory: Trajectory, recipe: Recipe, max_tokens: int) -> float:
    assert trajectory.reward.value is not None
    if not recipe.overlong_share:
        return trajectory.reward.value
    return trajectory.reward.value + overlong_penalty(
        trajectory.num_sampled,
        max_tokens=max_tokens,
        buffer_tokens=max(1, round(recipe.overlong_share * max_tokens)),
        scale=recipe.overlong_penalty,
    )


def group_advantages(rewards: Sequence[NDArray[np.float64]], recipe: Recipe) -> list[float]:
    """One advantage a trajectory, in the batch's order."""
    groups = ADVANTAGES[recipe.advantage]([torch.from_numpy(rewards_G) for rewards_G in rewards])
    return [float(advantage) for advantages_G in groups for advantage in advantages_G]


def prepare(trajectory: Trajectory, advantage_S: NDArray[np.float64], version: PolicyVersion) -> Prepared:
    with np.errstate(over="ignore"):  # an infinite advantage is found by the step's check
        advantages = advantage_S.astype(np.float32)
    spans = trajectory.versions
    num_tokens = [span.num_tokens for span in spans]
    lags = [max(0, version.step - span.version.step) for span in spans]
    return Prepared(
        sequence=token_sequence(trajectory),
        behaviour_S=behaviour_logprobs(trajectory),
        advantage_S=advantages,
        lag_S=np.repeat(np.array(lags, dtype=np.float32), num_tokens),
        same_version_S=np.repeat([span.version == version for span in spans], num_tokens),
    )
