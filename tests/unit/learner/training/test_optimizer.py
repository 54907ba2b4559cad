import pytest
import torch

from learner.training.config import OptimizerConfig, Schedule
from learner.training.optimizer import clip_gradients, learning_rate, make_optimizer


def rates(config: OptimizerConfig, num_steps: int) -> list[float]:
    return [learning_rate(config, step=step, num_steps=num_steps) for step in range(num_steps)]


def test_a_constant_rate_follows_a_linear_warm_up() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert rates(config, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_schedule_falls_towards_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=Schedule.LINEAR)
    assert rates(config, 4) == [1.0, 0.75, 0.5, 0.25]


def test_a_cosine_schedule_is_half_way_down_in_the_middle() -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule=Schedule.COSINE, warmup_steps=2)
    assert learning_rate(config, step=6, num_steps=10) == pytest.approx(1.0)


def test_matrices_decay_and_vectors_do_not() -> None:
    optimizer = make_optimizer(torch.nn.Linear(3, 2), OptimizerConfig(weight_decay=0.1))
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.1), (1, 0.0)]


def test_gradients_are_scaled_to_the_norm_and_the_norm_before_is_returned() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(module, max_norm=1.0) == pytest.approx(5.0)
    torch.testing.assert_close(module.weight.grad, torch.tensor([[0.6, 0.8]]), rtol=1e-5, atol=1e-6)
