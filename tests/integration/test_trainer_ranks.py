"""The trainer as it runs in production: processes, FSDP2 over gloo, signals."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from learner.algorithms.recipe import Preset
from learner.config import RunConfig, ScheduleConfig
from learner.training.algorithm_config import AlgorithmConfig
from learner.training.checkpoint import POLICY, newest
from learner.training.checkpoint_reader import CheckpointReader
from learner.training.config import CheckpointConfig, Device, OptimizerConfig, TrainingConfig
from learner.training.launch import launch_command
from learner.training.parallel import Ranks
from learner.training.start import train
from penstock.config import to_toml
from tests.tiny_policy import write_tiny_policy
from tests.trainer_fakes import FakeCoordinator, NeverStop
from tests.trainer_server import TrainerServer

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
COMPARED = (
    "loss",
    "grad_norm",
    "ratio_mean",
    "ratio_max",
    "ess",
    "kl",
    "entropy",
    "clip_share",
    "reward_mean",
)


def write_run(
    tmp_path: Path,
    name: str,
    *,
    num_steps: int = 4,
    algorithm: AlgorithmConfig | None = None,
    tensor_ranks: int = 1,
    pipeline_ranks: int = 1,
) -> RunConfig:
    if not (tmp_path / "policy").exists():
        write_tiny_policy(tmp_path / "policy")
    run_dir = tmp_path / name
    run_dir.mkdir(exist_ok=True)
    config = RunConfig(
        policy=tmp_path / "policy",
        environments=("127.0.0.1:1",),
        run_dir=run_dir,
        schedule=ScheduleConfig(num_steps=num_steps),
        algorithm=algorithm or AlgorithmConfig(updates_per_step=2),
        training=TrainingConfig(
            num_ranks=tensor_ranks * pipeline_ranks,
            tensor_ranks=tensor_ranks,
            pipeline_ranks=pipeline_ranks,
            device=Device.CPU,
            row_tokens=48,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            checkpoint=CheckpointConfig(every_steps=2),
        ),
    )
    (run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return config


@contextmanager
def trainer(config: RunConfig, server: TrainerServer, *, num_ranks: int):
    """Starts the ranks; whatever is left of them at the end is killed."""
    arguments = [str(config.run_dir), "--coordinator", server.address]
    process = subprocess.Popen(
        launch_command(module="learner.training", arguments=arguments, num_ranks=num_ranks),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    family = psutil.Process(process.pid)
    try:
        yield process
    finally:
        for member in [*family.children(recursive=True), family] if process.poll() is None else []:
            member.kill()
        process.communicate(timeout=10)


def train_here(config: RunConfig, coordinator: FakeCoordinator) -> FakeCoordinator:
    """One rank, in this process."""
    with ExitStack() as stack:
        train(config, ONE_RANK, coordinator, NeverStop(), stack)
    return coordinator


def listening(pid: int) -> list[str]:
    """Addresses on which a process and its children listen."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return [c.laddr.ip for member in family for c in member.net_connections() if c.status == "LISTEN"]


def test_two_ranks_give_the_losses_of_one_and_listen_on_loopback_only(tmp_path: Path) -> None:
    config = write_run(tmp_path, "two")
    addresses: list[str] = []
    with TrainerServer() as server:
        with trainer(config, server, num_ranks=2) as process:
            server.on_batch = lambda step: addresses.extend(listening(process.pid))
            _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert server.calls[-2:] == ["checkpoint 4", "finish 4"]
    assert set(addresses) == {"127.0.0.1"}
    alone = train_here(write_run(tmp_path, "one"), FakeCoordinator())
    for step in range(1, 5):
        for name in COMPARED:
            expected = alone.metrics[step][name]
            assert server.metrics[step][name] == pytest.approx(expected, rel=1e-5, abs=1e-5), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        (Preset.GSPO, {}),
        (Preset.PPO, {}),
        (Preset.ONLINE_DPO, {}),
        (Preset.PPO, {"tensor_ranks": 2}),
        (Preset.GSPO, {"pipeline_ranks": 2}),
        (Preset.DECOUPLED_PPO, {"pipeline_ranks": 2}),
        (Preset.ONLINE_DPO, {"pipeline_ranks": 2}),
    ],
)
def test_two_ranks_give_the_losses_of_one_with_every_kind_of_loss(
    tmp_path: Path, preset: Preset, layout: dict[str, int]
) -> None:
    """Sequence ratios, a critic, and pairs whose answers lie on different ranks; shared matrices; stages."""
    algorithm = AlgorithmConfig(preset=preset, updates_per_step=2)
    with TrainerServer() as server:
        config = write_run(tmp_path, "two", algorithm=algorithm, **layout)
        with trainer(config, server, num_ranks=2) as process:
            _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    alone = train_here(write_run(tmp_path, "one", algorithm=algorithm), FakeCoordinator())
    for step in range(1, 5):
        for name in ("loss", "grad_norm", "ratio_mean", "ess", "kl"):
            expected = alone.metrics[step][name]
            assert server.metrics[step][name] == pytest.approx(expected, rel=1e-4, abs=1e-5), (step, name)


def test_two_ranks_go_on_from_one_rank_s_checkpoint_and_sigterm_ends_them_in_order(tmp_path: Path) -> None:
    config = write_run(tmp_path, "resumed", num_steps=100)
    train_here(config, FakeCoordinator(stop_at=2))
    with TrainerServer(num_batches=3) as server, trainer(config, server, num_ranks=2) as process:
        server.wait_published(3)
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert server.calls == ["open 2", "publish 1.2", "publish 1.3", "checkpoint 3"]
    whole = write_run(tmp_path, "whole", num_steps=100)
    train_here(whole, FakeCoordinator(stop_at=3))
    with newest_reader(config) as resumed, newest_reader(whole) as expected:
        assert resumed.tensors.keys() == expected.tensors.keys()
        for name in resumed.tensors:
            tolerance = 1e-5 if name.startswith(POLICY) else 1e-4
            torch.testing.assert_close(resumed.full(name), expected.full(name), rtol=0, atol=tolerance)


def newest_reader(config: RunConfig) -> CheckpointReader:
    checkpoint = newest(config.run_dir / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 3
    return CheckpointReader(checkpoint.path)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_malformed_policy_ends_every_rank_with_status_2_and_no_traceback(
    tmp_path: Path, num_ranks: int
) -> None:
    config = write_run(tmp_path, "run")
    (tmp_path / "policy" / "model.safetensors").unlink()
    with TrainerServer() as server, trainer(config, server, num_ranks=num_ranks) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "has no weights; expected model.safetensors" in errors
    assert "Traceback" not in errors
    assert server.calls == []
