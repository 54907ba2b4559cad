import pytest
import torch

from learner.algorithms.sft import completion_cross_entropy


def test_the_loss_is_the_mean_negative_log_probability_over_all_rows() -> None:
    first, _ = completion_cross_entropy(torch.tensor([-1.0, -3.0]), num_tokens=3)
    second, _ = completion_cross_entropy(torch.tensor([-5.0]), num_tokens=3)
    assert (first + second).item() == pytest.approx(3.0)


def test_a_row_without_completion_tokens_adds_nothing() -> None:
    loss, sums = completion_cross_entropy(torch.zeros(0), num_tokens=3)
    assert loss.item() == 0.0
    assert sums == {}
