"""What only a GPU can show: mixed precision on a device, and a step that is queued ahead of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from learner.training.algorithm_config import AlgorithmConfig
from learner.training.checkpoint import Checkpoints
from learner.training.config import Device, OptimizerConfig, Precision
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.parallel import Ranks, local, open_ranks, place
from learner.training.policy_gradient import PolicyGradient
from learner.training.publish import Publisher
from learner.training.updater import Updater
from tests.tiny_policy import write_tiny_policy
from tests.trainer_fakes import VERSION, TensorSink, make_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_updater(folder: Path, ranks: Ranks, precision: Precision, *, deferred: bool = False) -> Updater:
    policy = load_policy(folder, deferred=deferred)
    place(policy, ranks, precision)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3))
    return Updater(policy, optimizer, ranks, row_tokens=64, rows_per_pass=2, max_grad_norm=1.0)


def make_algorithm(updater: Updater) -> PolicyGradient:
    return PolicyGradient(updater, AlgorithmConfig(updates_per_step=2).recipe(), max_tokens=12, seed=0)


@pytest.mark.parametrize("precision", list(Precision))
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(tmp_path: Path, precision: Precision) -> None:
    folder = write_tiny_policy(tmp_path / "policy", hidden_size=64)
    cpu = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
    tolerance = 1e-4 if precision is Precision.FLOAT32 else 3e-2
    with ExitStack() as stack:
        ranks = open_ranks(Device.CUDA, precision)
        stack.callback(ranks.close)
        updater = make_updater(folder, ranks, precision)
        assert next(updater.policy.parameters()).dtype == torch.float32
        algorithm = make_algorithm(updater)
        reference = make_algorithm(make_updater(folder, cpu, Precision.FLOAT32))
        for step in range(3):
            got = algorithm.step(make_batch(step), VERSION, learning_rate=1e-3)
            expected = reference.step(make_batch(step), VERSION, learning_rate=1e-3)
            assert not got.failure
            for name in ("loss", "kl", "entropy", "grad_norm"):
                assert got.metrics[name] == pytest.approx(
                    expected.metrics[name], rel=tolerance, abs=tolerance
                )
        sink = TensorSink()
        Publisher(updater.policy, ranks, sink, precision).write(VERSION)
        assert {tensor.dtype for tensor in sink.tensors} == {
            "F32" if precision is Precision.FLOAT32 else "BF16"
        }
        Checkpoints(tmp_path / "checkpoints", updater, keep=1).write(3)
        resumed = make_updater(folder, ranks, precision)
        assert Checkpoints(tmp_path / "checkpoints", resumed, keep=1).resume() == 3
        again = make_algorithm(resumed)
        assert again.step(make_batch(3), VERSION, learning_rate=1e-3).metrics["loss"] == pytest.approx(
            algorithm.step(make_batch(3), VERSION, learning_rate=1e-3).metrics["loss"], abs=1e-6
        )


@pytest.mark.parametrize("precision", list(Precision))
def test_steps_with_all_in_host_memory_are_those_on_the_gpu(tmp_path: Path, precision: Precision) -> None:
    folder = write_tiny_policy(tmp_path / "policy", hidden_size=64)
    steps = {}
    for offload in (False, True):
        with ExitStack() as stack:
            ranks = open_ranks(Device.CUDA, precision, cpu_offload=offload)
            stack.callback(ranks.close)
            updater = make_updater(folder, ranks, precision, deferred=offload)
            algorithm = make_algorithm(updater)
            reports = [algorithm.step(make_batch(step), VERSION, learning_rate=1e-3) for step in range(3)]
            steps[offload] = [report.metrics for report in reports]
            if offload:
                assert all(local(p).device.type == "cpu" for p in updater.policy.parameters())
                moments = [state["exp_avg"] for state in updater.optimizer.state.values()]
                assert all(local(moment).device.type == "cpu" for moment in moments)
            sink = TensorSink()
            Publisher(updater.policy, ranks, sink, precision).write(VERSION)
            Checkpoints(tmp_path / f"checkpoints-{offload}", updater, keep=1).write(3)
            resumed = make_updater(folder, ranks, precision)
            assert Checkpoints(tmp_path / f"checkpoints-{offload}", resumed, keep=1).resume() == 3
            steps[offload].append(
                make_algorithm(resumed).step(make_batch(3), VERSION, learning_rate=1e-3).metrics
            )
    tolerance = 1e-4 if precision is Precision.FLOAT32 else 3e-2
    for on_gpu, on_host in zip(steps[False], steps[True], strict=True):
        for name in ("loss", "kl", "entropy", "grad_norm"):
            assert on_host[name] == pytest.approx(on_gpu[name], rel=tolerance, abs=tolerance)


def test_weights_that_each_rank_reads_for_itself_go_to_the_gpu_at_once(tmp_path: Path) -> None:
    folder = write_tiny_policy(tmp_path / "policy", hidden_size=64)
    with ExitStack() as stack:
        ranks = open_ranks(Device.CUDA, Precision.FLOAT32)
        stack.callback(ranks.close)
        whole, deferred = (
            make_updater(folder, ranks, Precision.FLOAT32, deferred=each) for each in (False, True)
        )
        for got, expected in zip(deferred.policy.parameters(), whole.policy.parameters(), strict=True):
            assert got.is_cuda
            assert torch.equal(got, expected)
        assert all(buffer.is_cuda for buffer in deferred.policy.buffers())
