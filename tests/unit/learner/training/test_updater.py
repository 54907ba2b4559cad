"""What packing, accumulation and publishing must not change."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learner.algorithms.sums import Sums
from learner.training.algorithm_config import AlgorithmConfig
from learner.training.config import Device, OptimizerConfig, Precision
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.packing import PackedRow, TokenSequence
from learner.training.parallel import Ranks, local, open_ranks, place
from learner.training.policy import TokenScores
from learner.training.policy_gradient import PolicyGradient
from learner.training.publish import Publisher
from learner.training.updater import Snapshot, Updater
from penstock.trajectory import PolicyVersion
from tests.tiny_policy import write_tiny_policy
from tests.trainer_fakes import VERSION, TensorSink, make_batch

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("policy"))


def make_updater(folder: Path, *, row_tokens: int, rows_per_pass: int = 1) -> Updater:
    policy = load_policy(folder)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3))
    return Updater(
        policy,
        optimizer,
        ONE_RANK,
        row_tokens=row_tokens,
        rows_per_pass=rows_per_pass,
        max_grad_norm=1.0,
    )


def make_algorithm(updater: Updater, config: AlgorithmConfig) -> PolicyGradient:
    return PolicyGradient(updater, config.recipe(), max_tokens=12, seed=0)


def train(
    folder: Path, *, row_tokens: int, updates: int, rows_per_pass: int = 1
) -> tuple[dict[str, float], list[torch.Tensor]]:
    updater = make_updater(folder, row_tokens=row_tokens, rows_per_pass=rows_per_pass)
    algorithm = make_algorithm(updater, AlgorithmConfig(updates_per_step=updates))
    for step in range(3):
        metrics = algorithm.step(make_batch(step), VERSION, learning_rate=1e-3).metrics
    return metrics, [parameter.detach().clone() for parameter in updater.policy.parameters()]


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(("row_tokens", "rows_per_pass"), [(16, 1), (50, 1), (16, 3)])
def test_neither_the_row_budget_nor_rows_a_pass_change_losses_or_weights(
    folder: Path, row_tokens: int, rows_per_pass: int, updates: int
) -> None:
    metrics, weights = train(folder, row_tokens=4096, updates=updates)
    others, other_weights = train(folder, row_tokens=row_tokens, updates=updates, rows_per_pass=rows_per_pass)
    assert others == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    for got, expected in zip(other_weights, weights, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", list(Precision))
def test_an_update_that_is_not_finite_changes_nothing(folder: Path, precision: Precision) -> None:
    ranks = open_ranks(Device.CPU, precision)
    try:
        policy = load_policy(folder)
        place(policy, ranks, precision)
        optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3, weight_decay=0.1))
        updater = Updater(policy, optimizer, ranks, row_tokens=64, max_grad_norm=1.0)
        sequences = [
            TokenSequence(token_ids=np.arange(9, dtype=np.int32), loss_mask=np.ones(9, dtype=np.uint8))
        ]

        def update(factor: float) -> bool:
            def objective(row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
                return -scores.logprobs_S.mean() * factor, {}

            return updater.update(sequences, objective, learning_rate=1e-3).is_finite

        def state() -> list[torch.Tensor]:
            kept = [value for one in optimizer.state.values() for value in one.values()]
            return [local(tensor.detach()).clone() for tensor in (*policy.parameters(), *kept)]

        assert update(1.0)
        before = state()
        assert not update(float("nan"))
        assert all(torch.equal(got, expected) for got, expected in zip(state(), before, strict=True))
        assert update(1.0)
        assert not all(torch.equal(got, expected) for got, expected in zip(state(), before, strict=True))
    finally:
        ranks.close()


def test_scores_come_back_in_the_order_of_the_sequences(folder: Path) -> None:
    sequences = [
        TokenSequence(token_ids=t.token_ids, loss_mask=t.loss_mask) for t in make_batch().trajectories()
    ]
    together = make_updater(folder, row_tokens=40).score(sequences)
    for sequence, scores in zip(sequences, together, strict=True):
        (alone,) = make_updater(folder, row_tokens=40).score([sequence])
        assert scores == pytest.approx(alone, abs=1e-5)


def test_a_snapshot_brings_back_weights_and_optimiser(folder: Path) -> None:
    updater = make_updater(folder, row_tokens=64)
    algorithm = make_algorithm(updater, AlgorithmConfig())
    algorithm.step(make_batch(0), VERSION, learning_rate=1e-3)
    snapshot = Snapshot(updater)
    first = algorithm.step(make_batch(1), VERSION, learning_rate=1e-3).metrics
    after_first = [parameter.detach().clone() for parameter in updater.policy.parameters()]
    snapshot.restore()
    assert algorithm.step(make_batch(1), VERSION, learning_rate=1e-3).metrics == first
    for got, expected in zip(updater.policy.parameters(), after_first, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_published_version_has_the_names_and_values_of_the_checkpoint_file(
    tmp_path: Path, tied: bool
) -> None:
    folder = write_tiny_policy(tmp_path, tied=tied)
    sink = TensorSink()
    Publisher(load_policy(folder), ONE_RANK, sink, Precision.FLOAT32).write(PolicyVersion(1, 0))
    expected = load_file(folder / "model.safetensors")
    assert {tensor.name for tensor in sink.tensors} == expected.keys()
    for tensor in sink.tensors:
        assert tensor.dtype == "F32"
        assert tensor.shape == tuple(expected[tensor.name].shape)
        assert tensor.data.tobytes() == expected[tensor.name].numpy().tobytes()


def test_half_precision_is_published_in_half_precision(folder: Path) -> None:
    sink = TensorSink()
    Publisher(load_policy(folder), ONE_RANK, sink, Precision.BFLOAT16).write(PolicyVersion(1, 0))
    for tensor in sink.tensors:
        assert tensor.dtype == "BF16"
        assert tensor.data.size == 2 * torch.Size(tensor.shape).numel()


def test_half_precision_computes_in_bfloat16_on_float32_masters(folder: Path) -> None:
    ranks = open_ranks(Device.CPU, Precision.BFLOAT16)
    try:
        policy = load_policy(folder)
        place(policy, ranks, Precision.BFLOAT16)
        optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3))
        updater = Updater(policy, optimizer, ranks, row_tokens=64, max_grad_norm=1.0)
        algorithm = make_algorithm(updater, AlgorithmConfig(updates_per_step=2))
        half = [algorithm.step(make_batch(step), VERSION, learning_rate=1e-3).metrics for step in range(3)][
            -1
        ]
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    finally:
        ranks.close()
    full, _ = train(folder, row_tokens=64, updates=2)
    assert half["entropy"] != full["entropy"]
    for name in ("loss", "kl", "entropy"):
        assert half[name] == pytest.approx(full[name], rel=0.05, abs=0.02)
