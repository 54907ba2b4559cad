import math

import pytest
import torch

from learner.algorithms.surrogate import clipped_surrogate


def surrogate(ratio: float, advantage: float) -> tuple[float, bool, float]:
    """(loss, whether clipped, gradient by the log-ratio)."""
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    losses, clipped = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.5)
    losses.sum().backward()
    assert log_ratio.grad is not None
    return losses.item(), bool(clipped.item()), log_ratio.grad.item()


def test_inside_the_bounds_it_is_the_ratio_times_the_advantage() -> None:
    loss, clipped, gradient = surrogate(1.1, 2.0)
    assert loss == pytest.approx(-2.2)
    assert gradient == pytest.approx(-2.2)
    assert not clipped


@pytest.mark.parametrize(("ratio", "advantage", "loss"), [(2.0, 1.0, -1.5), (0.5, -1.0, 0.8)])
def test_beyond_a_bound_in_the_advantage_s_direction_the_gradient_is_zero(
    ratio: float, advantage: float, loss: float
) -> None:
    assert surrogate(ratio, advantage) == (pytest.approx(loss), True, 0.0)


@pytest.mark.parametrize(("ratio", "advantage"), [(2.0, -1.0), (0.5, 1.0)])
def test_beyond_a_bound_against_it_the_pessimistic_value_keeps_its_gradient(
    ratio: float, advantage: float
) -> None:
    loss, clipped, gradient = surrogate(ratio, advantage)
    assert loss == pytest.approx(-ratio * advantage)
    assert gradient == pytest.approx(-ratio * advantage)
    assert not clipped


def test_an_advantage_of_zero_is_never_counted_as_clipped() -> None:
    assert surrogate(3.0, 0.0) == (0.0, False, 0.0)
