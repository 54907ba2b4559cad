"""Single parts: surrogates, corrections over a whole update, divergences, filters, aggregation."""

import math

import numpy as np
import pytest
import torch

from learner.algorithms import aggregation, divergence
from learner.algorithms.corrections import second_moment_filter
from learner.algorithms.filters import is_informative, overlong_penalty
from learner.algorithms.health import effective_sample_share, limit_health, mismatch, ratio_health
from learner.algorithms.ratios import LOG_RATIO_BOUND, log_ratio, sequence_ratio
from learner.algorithms.sequences import Sequences
from learner.algorithms.surrogates import clipped


def surrogate(ratio: float, advantage: float, *, dual_clip: float = 0.0) -> tuple[float, bool, float]:
    """(loss, whether clipped, gradient by the log-ratio)."""
    log_u = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    losses, held = clipped(log_u, log_u, advantages, clip_low=0.2, clip_high=0.5, dual_clip=dual_clip)
    losses.sum().backward()
    assert log_u.grad is not None
    return losses.item(), bool(held.item()), log_u.grad.item()


def test_inside_the_bounds_it_is_the_ratio_times_the_advantage() -> None:
    loss, held, gradient = surrogate(1.1, 2.0)
    assert loss == pytest.approx(-2.2)
    assert gradient == pytest.approx(-2.2)
    assert not held


@pytest.mark.parametrize(("ratio", "advantage", "loss"), [(2.0, 1.0, -1.5), (0.5, -1.0, 0.8)])
def test_beyond_a_bound_in_the_advantage_s_direction_the_gradient_is_zero(
    ratio: float, advantage: float, loss: float
) -> None:
    assert surrogate(ratio, advantage) == (pytest.approx(loss), True, 0.0)


@pytest.mark.parametrize(("ratio", "advantage"), [(2.0, -1.0), (0.5, 1.0)])
def test_beyond_a_bound_against_it_the_pessimistic_value_keeps_its_gradient(
    ratio: float, advantage: float
) -> None:
    loss, held, gradient = surrogate(ratio, advantage)
    assert loss == pytest.approx(-ratio * advantage)
    assert gradient == pytest.approx(-ratio * advantage)
    assert not held


def test_the_dual_clip_bounds_the_loss_of_a_negative_advantage() -> None:
    assert surrogate(9.0, -2.0, dual_clip=3.0) == (pytest.approx(6.0), True, 0.0)
    assert surrogate(2.0, -2.0, dual_clip=3.0) == surrogate(2.0, -2.0)
    assert surrogate(9.0, 2.0, dual_clip=3.0) == surrogate(9.0, 2.0)


def test_an_advantage_of_zero_is_never_counted_as_clipped() -> None:
    assert surrogate(3.0, 0.0) == (0.0, False, 0.0)


def test_a_ratio_is_bounded_and_two_impossible_tokens_are_equal() -> None:
    impossible = torch.tensor([-math.inf, 0.0, -math.inf])
    ratios = log_ratio(impossible, torch.tensor([0.0, -math.inf, -math.inf]))
    assert ratios.tolist() == [-LOG_RATIO_BOUND, LOG_RATIO_BOUND, 0.0]


def test_a_sequence_s_ratio_is_the_geometric_mean_of_its_tokens() -> None:
    new = torch.log(torch.tensor([0.5, 0.2, 0.9]))
    old = torch.log(torch.tensor([0.25, 0.1, 0.3]))
    found = sequence_ratio(new, old, Sequences.of([2, 1])).exp()
    torch.testing.assert_close(found, torch.tensor([2.0, 2.0, 3.0]))


@pytest.mark.parametrize("seed", range(5))
def test_the_second_moment_filter_drops_the_worst_until_the_mean_is_small_enough(seed: int) -> None:
    log_ratios = np.random.default_rng(seed).normal(scale=0.4, size=50)
    keep = second_moment_filter(log_ratios, threshold=0.04)
    kept = sorted((x * x for x in log_ratios), reverse=True)
    while np.mean(kept) > 0.04:
        kept.pop(0)
    assert sorted(log_ratios[keep] ** 2) == pytest.approx(sorted(kept))
    assert second_moment_filter(log_ratios * 0.01, threshold=0.04).all()


def test_estimates_of_a_divergence_average_to_it() -> None:
    pi, ref = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.25, 0.35, 0.4])
    exact = (pi * (pi / ref).log()).sum()
    for estimate in (divergence.k1, divergence.k3):
        torch.testing.assert_close((pi * estimate(pi.log(), ref.log())).sum(), exact)
    torch.testing.assert_close((pi * divergence.k2(pi.log(), ref.log())).sum(), exact, rtol=0.05, atol=0)


def test_as_a_loss_only_k2_and_k3_pull_toward_the_reference() -> None:
    """On-policy, E[grad k1] is E[grad log pi] = 0, whatever the reference."""
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()

    def expected_gradient(estimate) -> torch.Tensor:  # type: ignore[no-untyped-def]
        logprobs = logits.log_softmax(0)
        (gradient,) = torch.autograd.grad((logprobs.exp().detach() * estimate(logprobs, ref)).sum(), logits)
        return gradient

    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    assert expected_gradient(divergence.k1).abs().max() < 1e-12
    torch.testing.assert_close(expected_gradient(divergence.k2), exact)
    assert torch.cosine_similarity(expected_gradient(divergence.k3), exact, dim=0) > 0.5


def test_overlong_answers_lose_reward_in_a_line() -> None:
    lost = [overlong_penalty(n, max_tokens=10, buffer_tokens=4, scale=2.0) for n in (1, 6, 7, 8, 10, 12)]
    assert lost == pytest.approx([0.0, 0.0, -0.5, -1.0, -2.0, -2.0])


def test_a_group_with_equal_rewards_teaches_nothing() -> None:
    assert not is_informative([0.5, 0.5])
    assert is_informative([0.5, 0.0])


@pytest.mark.parametrize(
    ("weigh", "expected"),
    [
        (aggregation.token_mean, 0.25 * (1 + 2 + 3 + 4)),
        (aggregation.sequence_mean, 0.5 * ((1 + 2 + 3) / 3 + 4)),
        (aggregation.sequence_sum, 0.5 * (1 + 2 + 3 + 4)),
        (lambda lengths: aggregation.constant_length(lengths, num_tokens=5), 0.1 * (1 + 2 + 3 + 4)),
    ],
)
def test_an_aggregation_weighs_each_token_of_each_sequence(weigh, expected: float) -> None:  # type: ignore[no-untyped-def]
    weights = np.repeat(weigh(np.array([3, 1])), [3, 1])
    assert (weights * [1, 2, 3, 4]).sum() == pytest.approx(expected)


def test_health_counts_limited_tokens_by_the_advantage_s_sign() -> None:
    limited = torch.tensor([True, True, True, False])
    health = limit_health(limited, torch.tensor([1.0, 2.0, -1.0, 1.0]))
    assert health["limited_positive_sum"].item() == 2
    assert health["limited_negative_sum"].item() == 1


def test_health_of_a_row_without_tokens_is_zero() -> None:
    health = ratio_health(torch.zeros(0), torch.zeros(0))
    assert {value.item() for value in health.values()} == {0.0}


def test_mismatch_counts_only_tokens_of_the_version_trained_on() -> None:
    sums = mismatch(
        torch.tensor([-1.0, -5.0]), torch.tensor([-1.0 - math.log(2), -1.0]), torch.tensor([True, False])
    )
    assert sums["mismatch_kl_sum"].item() == pytest.approx(2 - 1 - math.log(2), rel=1e-5)
    assert sums["same_version_sum"].item() == 1


@pytest.mark.parametrize(("ratios", "share"), [([1.0] * 4, 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([], 0.0)])
def test_the_effective_sample_share(ratios: list[float], share: float) -> None:
    squares = sum(ratio * ratio for ratio in ratios)
    assert effective_sample_share(sum(ratios), squares, len(ratios)) == share
