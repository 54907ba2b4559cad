import math

import numpy as np
import pytest
import torch

from learner.algorithms import advantages
from learner.algorithms.gae import token_advantages, whitened
from learner.training.compose import ADVANTAGES


def groups(*rewards: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(rewards_G, dtype=torch.float64) for rewards_G in rewards]


def test_an_advantage_is_the_distance_from_the_group_in_standard_deviations() -> None:
    (found,) = advantages.group_std(groups([0.0, 0.0, 1.0, 1.0]))
    expected = 0.5 / math.sqrt(1 / 3)
    assert found.tolist() == pytest.approx([-expected, -expected, expected, expected], rel=1e-5)


def test_without_scaling_an_advantage_is_the_distance_from_the_mean() -> None:
    (found,) = advantages.group_mean(groups([1.0, 2.0, 6.0]))
    assert found.tolist() == pytest.approx([-2.0, -1.0, 3.0])


def test_leaving_one_out_compares_with_the_others() -> None:
    rewards = [1.0, 2.0, 6.0, -3.0]
    (found,) = advantages.leave_one_out(groups(rewards))
    expected = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert found.tolist() == pytest.approx(expected)


def test_reinforce_plus_plus_normalises_over_the_step() -> None:
    first, second = advantages.batch_std(groups([0.0, 1.0], [4.0, 7.0]))
    rewards = np.array([0.0, 1.0, 4.0, 7.0])
    expected = (rewards - rewards.mean()) / rewards.std(ddof=1)
    assert [*first.tolist(), *second.tolist()] == pytest.approx(expected.tolist(), rel=1e-5)


def test_its_baseline_form_subtracts_the_group_s_mean_first() -> None:
    first, second = advantages.group_mean_batch_std(groups([0.0, 1.0], [4.0, 7.0]))
    centred = np.array([-0.5, 0.5, -1.5, 1.5])
    assert [*first.tolist(), *second.tolist()] == pytest.approx(
        (centred / centred.std(ddof=1)).tolist(), rel=1e-5
    )


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1e9] * 7, [0.0, 0.0], [0.7]])
def test_equal_rewards_and_lone_trajectories_give_exactly_zero(kind: str, rewards: list[float]) -> None:
    (found,) = ADVANTAGES[kind](groups(rewards))  # type: ignore[index]
    assert found.tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_large_rewards_that_differ_little_keep_their_precision(kind: str) -> None:
    """A variance as E[x^2] - E[x]^2 would cancel to noise, and give advantages in the thousands."""
    (near,) = ADVANTAGES[kind](groups([0.0, 0.5, 1.0]))  # type: ignore[index]
    (far,) = ADVANTAGES[kind](groups([1e8, 1e8 + 0.5, 1e8 + 1.0]))  # type: ignore[index]
    assert far.tolist() == pytest.approx(near.tolist(), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_generalised_advantages_are_the_sum_of_their_definition(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rewards, values = draw.normal(size=7), draw.normal(size=7)
    gamma, lam = 0.97, 0.9
    found, targets = token_advantages(rewards, values, gamma=gamma, lam=lam)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(7)]
    expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(7 - t)) for t in range(7)]
    assert found.tolist() == pytest.approx(expected)
    assert targets.tolist() == pytest.approx((np.array(expected) + values).tolist())


def test_with_lambda_1_the_target_is_the_return_whatever_the_critic_says() -> None:
    rewards = np.array([0.0, 0.0, 1.0])
    _, targets = token_advantages(rewards, np.array([5.0, -3.0, 0.2]), gamma=1.0, lam=1.0)
    assert targets.tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_whitened_advantages_have_mean_0_and_deviation_1_over_all_tokens() -> None:
    parts = whitened([np.array([1.0, 2.0]), np.array([7.0])])
    flat = np.concatenate(parts)
    assert [len(part) for part in parts] == [2, 1]
    assert flat.mean() == pytest.approx(0.0)
    assert flat.std() == pytest.approx(1.0)
    assert [part.tolist() for part in whitened([np.array([3.0]), np.array([3.0])])] == [[0.0], [0.0]]
