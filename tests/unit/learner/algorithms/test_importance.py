import math

import pytest
import torch

from learner.algorithms.importance import (
    LOG_RATIO_BOUND,
    effective_sample_share,
    k3,
    log_ratio,
    ratio_health,
    truncated_weights,
)


def test_weights_are_the_ratio_of_probabilities_truncated_at_the_cap() -> None:
    proximal = torch.log(torch.tensor([0.5, 0.9, 0.1]))
    behaviour = torch.log(torch.tensor([0.25, 0.1, 0.2]))
    weights, ratios = truncated_weights(proximal, behaviour, cap=3.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 3.0, 0.5]))
    torch.testing.assert_close(ratios.exp(), torch.tensor([2.0, 9.0, 0.5]))


def test_weights_carry_no_gradient() -> None:
    proximal = torch.tensor([-1.0], requires_grad=True)
    weights, _ = truncated_weights(proximal, torch.tensor([-1.0]), cap=2.0)
    assert not weights.requires_grad


def test_a_ratio_is_bounded_and_two_impossible_tokens_are_equal() -> None:
    impossible = torch.tensor([-math.inf, 0.0, -math.inf])
    ratios = log_ratio(impossible, torch.tensor([0.0, -math.inf, -math.inf]))
    assert ratios.tolist() == [-LOG_RATIO_BOUND, LOG_RATIO_BOUND, 0.0]


def test_the_k3_estimate_averages_to_the_divergence() -> None:
    mu, prox = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.4, 0.4, 0.2])
    divergence = (mu * (mu / prox).log()).sum()
    torch.testing.assert_close((mu * k3((prox / mu).log())).sum(), divergence)
    assert bool((k3(torch.linspace(-5, 5, 101)) >= 0).all())


def test_health_counts_truncated_tokens_by_the_advantage_s_sign() -> None:
    log_ratios = torch.log(torch.tensor([4.0, 4.0, 4.0, 1.0]))
    health = ratio_health(log_ratios, torch.tensor([1.0, 2.0, -1.0, 1.0]), cap=2.0)
    assert health["truncated_positive_sum"].item() == 2
    assert health["truncated_negative_sum"].item() == 1
    assert health["ratio_max"].item() == pytest.approx(4.0)


def test_health_of_a_row_without_tokens_is_zero() -> None:
    health = ratio_health(torch.zeros(0), torch.zeros(0), cap=2.0)
    assert {value.item() for value in health.values()} == {0.0}


@pytest.mark.parametrize(("ratios", "share"), [([1.0] * 4, 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([], 0.0)])
def test_the_effective_sample_share(ratios: list[float], share: float) -> None:
    squares = sum(ratio * ratio for ratio in ratios)
    assert effective_sample_share(sum(ratios), squares, len(ratios)) == share
