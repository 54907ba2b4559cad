"""Policy gradients against literal transcriptions of the papers, and in limiting cases."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.algorithms.health import summarise
from learner.algorithms.policy_gradient import policy_gradient_loss
from learner.algorithms.ratios import interpolated_proximal
from learner.algorithms.recipe import PRESETS, Correction, Divergence, Preset, Recipe
from learner.algorithms.sequences import Sequences
from learner.algorithms.sums import add_sums
from learner.training.compose import compose_parts
from tests.unit.learner.algorithms.rows import Case, assert_equal, make_case, our_loss, row_terms

FP64 = torch.float64
RECIPES = {str(preset): recipe for preset, recipe in PRESETS.items()} | {
    "reference": replace(PRESETS[Preset.GRPO], kl=Divergence.K3, kl_coefficient=0.1),
    "geometric": replace(
        PRESETS[Preset.GRPO], correction=Correction.GEOMETRIC, correction_low=0.9, correction_high=1.1
    ),
} | {
    str(correction): replace(PRESETS[Preset.DECOUPLED_PPO], correction=correction, correction_high=1.2)
    for correction in (Correction.TRUNCATE_SEQUENCE, Correction.MASK, Correction.MASK_SEQUENCE)
}  # fmt: skip
ALL = pytest.mark.parametrize("name", RECIPES)


def on_policy(seed: int = 0) -> Case:
    case = make_case(seed, FP64)
    return replace(case, old=case.new, behaviour=case.new, reference=case.new)


def tokens(case: Case) -> Iterator[tuple[int, int, float]]:
    """(flat index, sequence, advantage) of each token."""
    flat = 0
    for sequence, length in enumerate(case.lengths):
        for _ in range(length):
            yield flat, sequence, case.advantages[sequence].item()
            flat += 1


def ratio(top: torch.Tensor, bottom: torch.Tensor, i: int) -> float:
    return math.exp(top[i].item()) / math.exp(bottom[i].item())


def mean_ratio(case: Case, top: torch.Tensor, bottom: torch.Tensor, sequence: int) -> float:
    """The geometric mean of a sequence's ratios."""
    inside = [i for i, owner, _ in tokens(case) if owner == sequence]
    product = math.prod(ratio(top, bottom, i) for i in inside)
    return float(product ** (1 / len(inside)))


def decoupled(weight: Callable[[Case, int, int], float]) -> Callable[[Case], float]:
    """Fu et al. 2025 ("AReaL"), eq. 5, with another weight for pi_prox / pi_behav."""

    def loss(case: Case) -> float:
        total = 0.0
        for i, sequence, advantage in tokens(case):
            u = ratio(case.new, case.old, i)
            surrogate = min(u * advantage, min(max(u, 0.8), 1.2) * advantage)
            total -= weight(case, i, sequence) * surrogate
        return total / sum(case.lengths)

    return loss


def between(value: float, low: float, high: float) -> float:
    return value if low <= value <= high else 0.0


LITERAL: dict[str, Callable[[Case], float]] = {
    "decoupled_ppo": decoupled(lambda case, i, _: min(ratio(case.old, case.behaviour, i), 1.2)),
    "truncate_sequence": decoupled(
        lambda case, _, s: min(mean_ratio(case, case.old, case.behaviour, s), 1.2)
    ),
    "mask": decoupled(lambda case, i, _: between(ratio(case.old, case.behaviour, i), 0.5, 1.2)),
    "mask_sequence": decoupled(
        lambda case, _, s: between(mean_ratio(case, case.old, case.behaviour, s), 0.5, 1.2)
    ),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", LITERAL)
def test_a_decoupled_loss_is_its_paper_s_formula(name: str, seed: int) -> None:
    case = make_case(seed, FP64)
    recipe = replace(RECIPES[name], correction_high=1.2)
    loss, _ = our_loss(case, recipe, behaviour_is_proximal=False)
    assert loss == pytest.approx(LITERAL[name](case), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_dppo_drops_tokens_whose_probability_moved_too_far_in_their_advantage_s_direction(seed: int) -> None:
    case = make_case(seed, FP64, spread=1.0)
    loss, gradient = our_loss(case, PRESETS[Preset.DPPO_TV])
    total, dropped = 0.0, []
    for i, _, advantage in tokens(case):
        moved = math.exp(case.new[i].item()) - math.exp(case.old[i].item())
        if (advantage > 0 and moved > 0.2) or (advantage < 0 and moved < -0.2):
            dropped.append(i)
        else:
            total -= ratio(case.new, case.old, i) * advantage
    assert dropped
    assert loss == pytest.approx(total / sum(case.lengths), rel=1e-9)
    assert gradient[dropped].abs().max() == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_outside_the_geometric_bounds_is_left_out_whole(seed: int) -> None:
    case = make_case(seed, FP64)
    loss, gradient = our_loss(case, RECIPES["geometric"])
    total = 0.0
    for i, sequence, advantage in tokens(case):
        if 0.9 < mean_ratio(case, case.new, case.old, sequence) < 1.1:
            u = ratio(case.new, case.old, i)
            surrogate = min(u * advantage, min(max(u, 0.8), 1.2) * advantage)
            total -= surrogate / case.lengths[sequence] / len(case.lengths)
        else:
            assert gradient[i] == 0
    assert loss == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_an_interpolated_proximal_policy_lies_before_the_learner_by_one_version(lag: int) -> None:
    """A-3PO: alpha = 1 / (lag + 1) of mu in log space, so that mu's own successor gets mu."""
    new, behaviour = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -0.5])
    alpha = 1 / (lag + 1)
    expected = alpha * behaviour + (1 - alpha) * new
    torch.testing.assert_close(interpolated_proximal(new, behaviour, torch.full((2,), float(lag))), expected)


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_s_log_probability_is_rloo_s_loss(seed: int) -> None:
    """Ahmadian et al. 2024: on-policy the gradient is -A grad log pi(y), averaged over answers."""
    case = on_policy(seed)
    _, gradient = our_loss(case, PRESETS[Preset.RLOO], behaviour_is_proximal=False)
    torch.testing.assert_close(gradient, -case.token_advantages / len(case.lengths))


@ALL
def test_on_policy_every_ratio_is_1_and_nothing_is_limited(name: str) -> None:
    case = on_policy()
    _, sums = policy_gradient_loss(row_terms(case, case.new, RECIPES[name]), compose_parts(RECIPES[name]))
    extra = {"entropy_sum": 6.0, "same_version_sum": 0.0}
    report = summarise({key: value.item() for key, value in sums.items()} | extra)
    assert report["ratio_mean"] == report["ratio_max"] == report["ess"] == pytest.approx(1.0)
    for quiet in ("kl", "clip_share", "masked_share_positive", "masked_share_negative"):
        assert report[quiet] == 0.0


@ALL
def test_on_policy_the_gradient_is_reinforce(name: str) -> None:
    case = on_policy()
    terms = row_terms(case, case.new, RECIPES[name])
    _, gradient = our_loss(case, RECIPES[name])
    expected = -terms.weights_S * case.token_advantages
    if name == "gspo":  # a token's gradient is its sequence's mean
        expected = terms.sequences.spread(terms.sequences.mean(expected))
    torch.testing.assert_close(gradient, expected)


@ALL
def test_advantages_of_zero_give_zero_loss_and_gradient(name: str) -> None:
    case = make_case(0, FP64)
    case = replace(case, advantages=torch.zeros_like(case.advantages))
    recipe = replace(RECIPES[name], kl=Divergence.NONE)
    loss, gradient = our_loss(case, recipe)
    assert loss == 0.0
    assert gradient.abs().max() == 0.0


@ALL
@pytest.mark.parametrize("behaviour_is_proximal", [True, False])
def test_impossible_tokens_and_extreme_ratios_leave_loss_and_gradient_finite(
    name: str, behaviour_is_proximal: bool
) -> None:
    extremes = torch.tensor([-math.inf, -400.0, -80.0, -1e-7, 0.0])
    new, old, behaviour = (
        grid.flatten() for grid in torch.meshgrid(extremes, extremes, extremes, indexing="ij")
    )
    lengths = [5] * 25
    advantages = torch.linspace(-3, 3, 25)
    case = Case(lengths=lengths, new=new, old=old, behaviour=behaviour, reference=old, advantages=advantages)
    loss, gradient = our_loss(case, RECIPES[name], behaviour_is_proximal=behaviour_is_proximal)
    assert math.isfinite(loss)
    assert bool(torch.isfinite(gradient).all())


@ALL
def test_nan_is_not_hidden(name: str) -> None:
    case = make_case(0, FP64)
    poisoned = case.new.clone()
    poisoned[0] = math.nan
    loss, _ = our_loss(replace(case, new=poisoned), RECIPES[name])
    assert math.isnan(loss)


@ALL
def test_a_row_without_tokens_gives_0(name: str) -> None:
    nothing = torch.zeros(0)
    case = Case(
        lengths=[], new=nothing, old=nothing, behaviour=nothing, reference=nothing, advantages=nothing
    )
    loss, gradient = our_loss(case, RECIPES[name])
    assert loss == 0.0
    assert gradient.numel() == 0


def test_a_row_whose_tokens_are_all_masked_gives_0_and_says_so() -> None:
    case = make_case(0, FP64)
    far = replace(case, behaviour=case.old - 3.0)
    loss, gradient = our_loss(far, RECIPES["mask"], behaviour_is_proximal=False)
    assert loss == 0.0
    assert gradient.abs().max() == 0.0
    terms = row_terms(far, far.new, RECIPES["mask"], behaviour_is_proximal=False)
    _, sums = policy_gradient_loss(terms, compose_parts(RECIPES["mask"]))
    assert sums["limited_positive_sum"] + sums["limited_negative_sum"] == sum(case.lengths)


@ALL
def test_rows_add_up_to_the_step_however_it_is_cut(name: str) -> None:
    case, recipe = make_case(3, FP64), RECIPES[name]
    whole = row_terms(case, case.new, recipe, behaviour_is_proximal=False)
    expected, sums = policy_gradient_loss(whole, compose_parts(recipe))
    parts = [
        policy_gradient_loss(part, compose_parts(recipe))
        for part in (cut(case, recipe, [0, 1]), cut(case, recipe, []), cut(case, recipe, [5, 2, 4, 3]))
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(expected.item(), rel=1e-9)
    totals = add_sums(part for _, part in parts)
    assert {key: value.item() for key, value in totals.items()} == pytest.approx(
        {key: float(value) for key, value in sums.items()}
    )


def cut(case: Case, recipe: Recipe, members: list[int]):  # type: ignore[no-untyped-def]
    """Some of the sequences as a row of their own, weighed as in the whole update."""
    whole = row_terms(case, case.new, recipe, behaviour_is_proximal=False)
    starts = np.cumsum([0, *case.lengths])
    chosen = [np.arange(starts[m], starts[m + 1]) for m in members]
    take = torch.from_numpy(np.concatenate([np.zeros(0, dtype=int), *chosen]))
    names = [
        "logprobs_S",
        "proximal_S",
        "anchor_S",
        "behaviour_S",
        "advantages_S",
        "weights_S",
        "reference_S",
    ]
    fields = {name: getattr(whole, name)[take] for name in names}
    return replace(whole, **fields, sequences=Sequences.of([case.lengths[m] for m in members]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "decoupled_ppo", "dppo_tv"])
def test_single_precision_stays_near_double(name: str, seed: int) -> None:
    recipe = RECIPES[name]
    spread = 1e-3 if name == "gspo" else 0.3
    single, double = make_case(seed, torch.float32, spread=spread), make_case(seed, FP64, spread=spread)
    loss, gradient = our_loss(double, recipe)
    assert_equal(our_loss(single, recipe), (loss, gradient.float()), torch.float32)


def test_a_long_answer_is_not_weighed_by_the_sum_of_its_log_ratios() -> None:
    """As exp(sum) a drift of 1% a token over 2,000 tokens would be a ratio of e^20, clipped for good."""
    long = torch.full((2000,), -1.0, dtype=FP64)
    case = Case(
        lengths=[2000],
        new=long,
        old=long - 1e-4,
        behaviour=long - 1e-2,
        reference=long,
        advantages=torch.ones(1, dtype=FP64),
    )
    _, gradient = our_loss(case, PRESETS[Preset.GSPO])
    assert gradient.sum().item() == pytest.approx(-1.0, rel=1e-3)
    weighed = replace(PRESETS[Preset.DECOUPLED_PPO], correction=Correction.MASK_SEQUENCE)
    loss, _ = our_loss(case, weighed, behaviour_is_proximal=False)
    assert loss == pytest.approx(-math.exp(0.0099 + 1e-4), rel=1e-3)


def test_masking_never_multiplies_zero_by_infinity() -> None:
    """0 x inf is NaN, and one NaN in a sum poisons the run."""
    new = torch.tensor([-math.inf, -1.0], requires_grad=True)
    case = Case(
        lengths=[2],
        new=new.detach(),
        old=torch.tensor([-1.0, -1.0]),
        behaviour=torch.tensor([-math.inf, -1.0]),
        reference=torch.tensor([-1.0, -1.0]),
        advantages=torch.ones(1),
    )
    for name in ("mask", "dppo_tv", "geometric", "reference"):
        loss, gradient = our_loss(case, RECIPES[name], behaviour_is_proximal=False)
        assert math.isfinite(loss)
        assert bool(torch.isfinite(gradient).all())
