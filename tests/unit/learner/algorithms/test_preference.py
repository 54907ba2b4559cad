"""Preference losses and their gradients against TRL's code, against transcriptions, and at their limits."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learner.algorithms.preference import PairScores
from learner.algorithms.preference_recipe import PreferenceLoss, PreferenceRecipe
from learner.algorithms.rewards import bradley_terry
from learner.training.preference import compose_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
SEEDS = pytest.mark.parametrize("seed", range(3))
LOSSES = {
    loss: PreferenceRecipe(
        loss=loss,
        beta=2.0 if loss is PreferenceLoss.SIMPO else 0.3,
        label_smoothing=0.1 if loss in (PreferenceLoss.CDPO, PreferenceLoss.ROBUST) else 0.0,
        margin=0.5 if loss is PreferenceLoss.SIMPO else 0.0,
    )
    for loss in PreferenceLoss
}


def make_pairs(seed: int, dtype: torch.dtype, num: int = 6) -> PairScores:
    draw = torch.Generator().manual_seed(seed)

    def logps() -> torch.Tensor:
        return (-8 * torch.rand(num, generator=draw, dtype=torch.float64) - 0.2).to(dtype)

    def tokens() -> torch.Tensor:
        return torch.randint(1, 9, (num,), generator=draw).to(dtype)

    return PairScores(
        chosen_P=logps().requires_grad_(),
        rejected_P=logps().requires_grad_(),
        chosen_reference_P=logps(),
        rejected_reference_P=logps(),
        chosen_tokens_P=tokens(),
        rejected_tokens_P=tokens(),
    )


def ours(pairs: PairScores, recipe: PreferenceRecipe, kl: float = 0.0) -> tuple[torch.Tensor, ...]:
    loss = compose_loss(recipe, kl=kl)(pairs).mean()
    return loss, *torch.autograd.grad(loss, (pairs.chosen_P, pairs.rejected_P))


def assert_equal(
    found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> None:
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    for got, wanted in zip(found, expected, strict=True):
        assert float((got - wanted).norm()) <= tolerance * float(wanted.norm())


def trl_dpo(pairs: PairScores, recipe: PreferenceRecipe, loss_type: str) -> tuple[torch.Tensor, ...]:
    """DPOTrainer._compute_loss on a model that answers with given log-probabilities."""
    from trl.trainer.dpo_trainer import DPOTrainer

    from tests.unit.learner.algorithms.trl_losses import trainer

    lengths = torch.cat([pairs.chosen_tokens_P, pairs.rejected_tokens_P]).long()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]

    def outputs(chosen: torch.Tensor, rejected: torch.Tensor) -> SimpleNamespace:
        each = torch.cat([chosen, rejected]) / lengths
        log_probs = torch.where(inside, each[:, None], 0.0)
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=inside,
        )

    class Model:
        training = True

        def __call__(self, **_: Any) -> SimpleNamespace:
            return outputs(pairs.chosen_P, pairs.rejected_P)

    of_trainer = trainer(
        model=Model(),
        ref_model=lambda **_: outputs(pairs.chosen_reference_P, pairs.rejected_reference_P),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=recipe.beta,
        label_smoothing=recipe.label_smoothing,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        _is_vlm=False,
        _total_train_tokens=0,
        _tp_size=1,
        max_length=None,
        truncation_mode="keep_start",
    )
    mask = torch.cat([torch.zeros(len(lengths), 1, dtype=torch.bool), inside], dim=1).long()
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": pairs.chosen_reference_P,
        "ref_rejected_logps": pairs.rejected_reference_P,
    }
    loss = DPOTrainer._compute_loss(of_trainer, of_trainer.model, inputs, False)
    return loss, *torch.autograd.grad(loss, (pairs.chosen_P, pairs.rejected_P))


@DTYPES
@SEEDS
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "robust"])
def test_a_loss_and_its_gradient_are_those_of_trl_s_dpo_trainer(
    loss: str, seed: int, dtype: torch.dtype
) -> None:
    pytest.importorskip("trl", reason="TRL, the independent implementation, is not installed")
    pairs, recipe = make_pairs(seed, dtype), LOSSES[PreferenceLoss(loss)]
    assert_equal(ours(pairs, recipe), trl_dpo(pairs, recipe, loss), dtype)


@DTYPES
@SEEDS
@pytest.mark.parametrize("loss", [PreferenceLoss.SIMPO, PreferenceLoss.CDPO])
def test_simpo_and_smoothed_labels_are_those_of_trl_s_cpo_trainer(
    loss: PreferenceLoss, seed: int, dtype: torch.dtype
) -> None:
    pytest.importorskip("trl", reason="TRL, the independent implementation, is not installed")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    pairs, recipe = make_pairs(seed, dtype), LOSSES[loss]
    of_trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="simpo" if loss is PreferenceLoss.SIMPO else "sigmoid",
        beta=recipe.beta,
        simpo_gamma=recipe.margin,
        label_smoothing=recipe.label_smoothing,
    )
    if loss is PreferenceLoss.SIMPO:
        given = pairs.chosen_P / pairs.chosen_tokens_P, pairs.rejected_P / pairs.rejected_tokens_P
    else:
        given = pairs.chosen_ratio, pairs.rejected_ratio
    losses, _, _ = CPOTrainer.cpo_loss(of_trainer, *given)
    expected = losses.mean()
    gradient = torch.autograd.grad(expected, (pairs.chosen_P, pairs.rejected_P))
    assert_equal(ours(pairs, recipe), (expected, *gradient), dtype)


@SEEDS
def test_orpo_s_odds_ratio_is_trl_s(seed: int) -> None:
    """TRL casts to fp32 inside, so fp32 is compared."""
    pytest.importorskip("trl", reason="TRL, the independent implementation, is not installed")
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    pairs, recipe = make_pairs(seed, torch.float32), LOSSES[PreferenceLoss.ORPO]
    of_trainer = SimpleNamespace(beta=recipe.beta, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = pairs.chosen_P / pairs.chosen_tokens_P, pairs.rejected_P / pairs.rejected_tokens_P
    ratios, *_ = ORPOTrainer.odds_ratio_loss(of_trainer, chosen, rejected)
    expected = (-chosen - ratios).mean()
    gradient = torch.autograd.grad(expected, (pairs.chosen_P, pairs.rejected_P))
    assert_equal(ours(pairs, recipe), (expected, *gradient), torch.float32)


def literal(pairs: PairScores, of_pair: Callable[..., float]) -> float:
    """The mean of a formula over pairs, one after the other."""
    columns = [
        pairs.chosen_P, pairs.rejected_P, pairs.chosen_reference_P, pairs.rejected_reference_P,
        pairs.chosen_tokens_P, pairs.rejected_tokens_P,
    ]  # fmt: skip
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return sum(of_pair(*row) for row in rows) / len(pairs.chosen_P)


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


LITERAL: dict[PreferenceLoss, Callable[..., float]] = {
    PreferenceLoss.SIGMOID: lambda c, r, rc, rr, *_: -math.log(sig(0.3 * ((c - rc) - (r - rr)))),
    PreferenceLoss.CDPO: lambda c, r, rc, rr, *_: (
        -0.9 * math.log(sig(0.3 * ((c - rc) - (r - rr)))) - 0.1 * math.log(sig(-0.3 * ((c - rc) - (r - rr))))
    ),
    PreferenceLoss.SIMPO: lambda c, r, _rc, _rr, nc, nr: -math.log(sig(2.0 * c / nc - 2.0 * r / nr - 0.5)),
    PreferenceLoss.ORPO: lambda c, r, _rc, _rr, nc, nr: (
        -c / nc
        - 0.3
        * math.log(
            sig(
                math.log(
                    (math.exp(c / nc) / (1 - math.exp(c / nc))) / (math.exp(r / nr) / (1 - math.exp(r / nr)))
                )
            )
        )
    ),
    PreferenceLoss.KTO: lambda c, r, rc, rr, *_: (
        (1 - sig(0.3 * (c - rc - 0.7))) / 2 + (1 - sig(0.3 * (0.7 - (r - rr)))) / 2
    ),
}


@SEEDS
@pytest.mark.parametrize("loss", LITERAL)
def test_a_loss_is_its_paper_s_formula(loss: PreferenceLoss, seed: int) -> None:
    pairs = make_pairs(seed, torch.float64)
    found, *_ = ours(pairs, LOSSES[loss], kl=0.7)
    assert found.item() == pytest.approx(literal(pairs, LITERAL[loss]), rel=1e-9)


@pytest.mark.parametrize("loss", [loss for loss in PreferenceLoss if loss is not PreferenceLoss.IPO])
def test_every_loss_prefers_the_chosen_answer(loss: PreferenceLoss) -> None:
    _, chosen, rejected = ours(make_pairs(0, torch.float64), LOSSES[loss])
    assert bool((chosen <= 0).all())
    assert bool((rejected >= 0).all())


@pytest.mark.parametrize("loss", PreferenceLoss)
def test_impossible_and_certain_answers_leave_loss_and_gradient_finite(loss: PreferenceLoss) -> None:
    extremes = torch.tensor([-1e4, -1e-9, 0.0, -1e4], dtype=torch.float64)
    pairs = PairScores(
        chosen_P=extremes.clone().requires_grad_(),
        rejected_P=extremes.flip(0).requires_grad_(),
        chosen_reference_P=torch.full((4,), -5.0, dtype=torch.float64),
        rejected_reference_P=torch.full((4,), -5.0, dtype=torch.float64),
        chosen_tokens_P=torch.ones(4, dtype=torch.float64),
        rejected_tokens_P=torch.ones(4, dtype=torch.float64),
    )
    for value in ours(pairs, LOSSES[loss]):
        assert bool(torch.isfinite(value).all())


def test_at_the_reference_dpo_s_loss_is_log_2() -> None:
    pairs = make_pairs(0, torch.float64)
    same = PairScores(
        chosen_P=pairs.chosen_P,
        rejected_P=pairs.rejected_P,
        chosen_reference_P=pairs.chosen_P.detach(),
        rejected_reference_P=pairs.rejected_P.detach(),
        chosen_tokens_P=pairs.chosen_tokens_P,
        rejected_tokens_P=pairs.rejected_tokens_P,
    )
    assert ours(same, LOSSES[PreferenceLoss.SIGMOID])[0].item() == pytest.approx(math.log(2))


@DTYPES
def test_the_reward_model_s_loss_is_trl_s(dtype: torch.dtype) -> None:
    pytest.importorskip("trl", reason="TRL, the independent implementation, is not installed")
    from trl.trainer.reward_trainer import RewardTrainer

    from tests.unit.learner.algorithms.trl_losses import trainer

    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    rewards.requires_grad_()
    margins = torch.rand(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    of_trainer = trainer(
        args=SimpleNamespace(center_rewards_coefficient=0.01), _total_train_tokens=0, _tp_size=1
    )
    inputs = {"margin": margins, "attention_mask": torch.ones(8, 3)}
    expected = RewardTrainer.compute_loss(
        of_trainer, lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs
    )
    found = bradley_terry(rewards[:4], rewards[4:], margins, centering=0.01).mean()
    assert_equal(
        (found, *torch.autograd.grad(found, rewards)),
        (expected, *torch.autograd.grad(expected, rewards)),
        dtype,
    )
