"""GRPO's loss and advantages against hand-computed numbers and a literal transcription."""

import math
import random
from typing import Any

import pytest
import torch

from learner.algorithms.grpo import group_advantages, grpo_loss, mismatch, summarise
from learner.algorithms.sums import add_sums

SETTINGS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "importance_cap": 2.0}


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_an_advantage_is_the_distance_from_the_group_in_standard_deviations() -> None:
    advantages = group_advantages(tensor(0.0, 0.0, 1.0, 1.0), scale_by_std=True)
    expected = 0.5 / math.sqrt(1 / 3)
    torch.testing.assert_close(
        advantages, tensor(-expected, -expected, expected, expected), rtol=1e-5, atol=0
    )


def test_without_scaling_an_advantage_is_the_distance_from_the_mean() -> None:
    advantages = group_advantages(tensor(1.0, 2.0, 6.0), scale_by_std=False)
    torch.testing.assert_close(advantages, tensor(-2.0, -1.0, 3.0))


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1e9] * 7, [0.0, 0.0], [0.7]])
def test_equal_rewards_and_lone_trajectories_give_exactly_zero(
    rewards: list[float], scale_by_std: bool
) -> None:
    assert group_advantages(tensor(*rewards), scale_by_std=scale_by_std).tolist() == [0.0] * len(rewards)


def test_large_rewards_that_differ_little_keep_their_precision() -> None:
    near = group_advantages(tensor(0.0, 0.5, 1.0), scale_by_std=True)
    far = group_advantages(tensor(1e8, 1e8 + 0.5, 1e8 + 1.0), scale_by_std=True)
    torch.testing.assert_close(near, far, rtol=1e-6, atol=0)


def test_on_policy_the_gradient_is_reinforce() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 2.0])
    loss, _ = grpo_loss(logprobs, logprobs.detach(), logprobs.detach(), advantages, num_tokens=3, **SETTINGS)
    loss.backward()
    assert loss.item() == pytest.approx(-advantages.mean().item())
    torch.testing.assert_close(logprobs.grad, -advantages / 3)


def literal_loss(
    new: list[float], proximal: list[float], behaviour: list[float], advantages: list[float], count: int
) -> float:
    """The objective as the papers write it, one token after the other."""
    total = 0.0
    for log_new, log_prox, log_mu, advantage in zip(new, proximal, behaviour, advantages, strict=True):
        weight = min(math.exp(log_prox) / math.exp(log_mu), SETTINGS["importance_cap"])
        ratio = math.exp(log_new) / math.exp(log_prox)
        clipped = min(max(ratio, 1 - SETTINGS["clip_low"]), 1 + SETTINGS["clip_high"])
        total += weight * min(ratio * advantage, clipped * advantage)
    return -total / count


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_equals_a_literal_transcription(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 50)
    new, proximal, behaviour = ([draw.uniform(-6, -0.01) for _ in range(count)] for _ in range(3))
    proximal = [a + draw.gauss(0, 0.3) for a in new] if seed % 2 else proximal
    advantages = [draw.gauss(0, 1) for _ in range(count)]
    loss, _ = grpo_loss(
        tensor(*new),
        tensor(*proximal),
        tensor(*behaviour),
        tensor(*advantages),
        num_tokens=count + 7,
        **SETTINGS,
    )
    assert loss.item() == pytest.approx(
        literal_loss(new, proximal, behaviour, advantages, count + 7), rel=1e-6
    )


def test_rows_add_up_to_the_step() -> None:
    draw = torch.Generator().manual_seed(0)
    new, proximal, behaviour, advantages = (torch.randn(12, generator=draw) - 2 for _ in range(4))
    arguments = (new, proximal, behaviour, advantages)
    whole, whole_sums = grpo_loss(*arguments, num_tokens=12, **SETTINGS)
    parts = [grpo_loss(*(a[cut] for a in arguments), num_tokens=12, **SETTINGS)
             for cut in (slice(0, 5), slice(5, 5), slice(5, 12))]  # fmt: skip
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-6)
    totals = add_sums(sums for _, sums in parts)
    for name, value in whole_sums.items():
        assert totals[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_tokens_that_a_policy_rules_out_leave_loss_and_gradient_finite() -> None:
    impossible = torch.tensor([-math.inf, -1.0, -math.inf, -400.0, 0.0])
    logprobs = impossible.clone().requires_grad_()
    proximal = torch.tensor([-1.0, -math.inf, -math.inf, 0.0, -400.0])
    behaviour = torch.tensor([-1.0, -1.0, -math.inf, -400.0, 0.0])
    loss, sums = grpo_loss(
        logprobs, proximal, behaviour, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]), num_tokens=5, **SETTINGS
    )
    loss.backward()
    assert math.isfinite(loss.item())
    assert logprobs.grad is not None
    assert bool(torch.isfinite(logprobs.grad).all())
    assert all(bool(torch.isfinite(value)) for value in sums.values())


def test_nan_is_not_hidden() -> None:
    nan = torch.tensor([math.nan, -1.0])
    loss, _ = grpo_loss(nan, nan, torch.tensor([-1.0, -1.0]), torch.ones(2), num_tokens=2, **SETTINGS)
    assert math.isnan(loss.item())


def test_the_report_of_a_step_on_its_own_policy_is_calm() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0])
    _, sums = grpo_loss(
        logprobs, logprobs, logprobs, torch.tensor([1.0, -1.0, 0.0]), num_tokens=3, **SETTINGS
    )
    sums |= mismatch(logprobs, logprobs, torch.tensor([True, True, False]))
    report = summarise(
        {name: value.item() for name, value in sums.items()} | {"entropy_sum": 6.0},
    )
    assert report == {
        "ratio_mean": 1.0,
        "ratio_max": 1.0,
        "ess": 1.0,
        "kl": 0.0,
        "entropy": 2.0,
        "clip_share": 0.0,
        "truncated_share_positive": 0.0,
        "truncated_share_negative": 0.0,
        "mismatch_kl": 0.0,
    }


def test_mismatch_counts_only_tokens_of_the_version_trained_on() -> None:
    sums = mismatch(
        torch.tensor([-1.0, -5.0]), torch.tensor([-1.0 - math.log(2), -1.0]), torch.tensor([True, False])
    )
    assert sums["mismatch_kl_sum"].item() == pytest.approx(2 - 1 - math.log(2), rel=1e-5)
    assert sums["same_version_sum"].item() == 1
