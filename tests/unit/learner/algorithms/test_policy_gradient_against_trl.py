"""Losses and gradients against TRL's, on random log-probabilities of padded rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.algorithms.recipe import PRESETS, Divergence, Preset
from tests.unit.learner.algorithms.rows import assert_equal, make_case, our_loss

pytest.importorskip("trl", reason="TRL, the independent implementation, is not installed")

from tests.unit.learner.algorithms.trl_losses import grpo_loss, rloo_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
SEEDS = pytest.mark.parametrize("seed", range(4))

THE_SAME: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (PRESETS[Preset.GRPO], {"loss_type": "grpo"}),
    "grpo_with_reference": (
        replace(PRESETS[Preset.GRPO], kl=Divergence.K3, kl_coefficient=0.04),
        {"loss_type": "grpo", "beta": 0.04},
    ),
    "dapo": (PRESETS[Preset.DAPO], {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo_with_reference": (
        replace(PRESETS[Preset.DAPO], kl=Divergence.K3, kl_coefficient=0.1),
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1},
    ),
    "dual_clip": (
        replace(PRESETS[Preset.DAPO], dual_clip=1.5),
        {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5},
    ),
    "dr_grpo": (PRESETS[Preset.DR_GRPO], {"loss_type": "dr_grpo"}),
    "gspo": (
        PRESETS[Preset.GSPO],
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "cispo": (PRESETS[Preset.CISPO], {"loss_type": "cispo", "epsilon_high": 5.0}),
}


@DTYPES
@SEEDS
@pytest.mark.parametrize("name", THE_SAME)
def test_a_preset_s_loss_and_gradient_are_trl_s(name: str, seed: int, dtype: torch.dtype) -> None:
    recipe, settings = THE_SAME[name]
    spread = 1e-3 if name == "gspo" else 0.8 if name in ("cispo", "dual_clip") else 0.3
    case = make_case(seed, dtype, spread=spread)
    assert_equal(our_loss(case, recipe), grpo_loss(case, **settings), dtype)


@DTYPES
@SEEDS
def test_the_decoupled_loss_is_trl_s_with_truncated_importance_sampling(
    seed: int, dtype: torch.dtype
) -> None:
    recipe = replace(PRESETS[Preset.DECOUPLED_PPO], correction_high=1.3)
    case = make_case(seed, dtype)
    importance = torch.clamp(torch.exp(case.padded(case.old) - case.padded(case.behaviour)), max=1.3)
    theirs = grpo_loss(case, importance=importance, loss_type="dapo")
    assert_equal(our_loss(case, recipe, behaviour_is_proximal=False), theirs, dtype)


@DTYPES
@SEEDS
def test_on_policy_the_gradient_of_rloo_is_trl_s(seed: int, dtype: torch.dtype) -> None:
    """TRL weighs an answer by exp of a *sum* of log-ratios, which only on-policy means the same."""
    case = make_case(seed, dtype, on_policy=True)
    recipe = PRESETS[Preset.RLOO]
    terms = replace(case, behaviour=case.old)
    _, gradient = our_loss(terms, recipe, behaviour_is_proximal=False)
    loss, expected = rloo_loss(case)
    assert_equal((loss, gradient), (loss, expected), dtype)
