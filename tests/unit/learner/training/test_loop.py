from contextlib import ExitStack
from pathlib import Path

import torch

from learner.config import RunConfig, ScheduleConfig
from learner.training.config import CheckpointConfig, Device, OptimizerConfig, TrainingConfig
from learner.training.parallel import Ranks
from learner.training.start import train
from tests.tiny_policy import write_tiny_policy
from tests.trainer_fakes import FakeCoordinator, NeverStop

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


def run_config(tmp_path: Path, *, num_steps: int = 3, every_steps: int = 2) -> RunConfig:
    run_dir = tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    policy = tmp_path / "policy"
    if not policy.exists():
        write_tiny_policy(policy)
    return RunConfig(
        policy=policy,
        environments=("127.0.0.1:1",),
        run_dir=run_dir,
        schedule=ScheduleConfig(num_steps=num_steps),
        training=TrainingConfig(
            device=Device.CPU,
            row_tokens=64,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            checkpoint=CheckpointConfig(every_steps=every_steps, keep=2),
        ),
    )


def run_training(config: RunConfig, coordinator: FakeCoordinator) -> None:
    with ExitStack() as stack:
        train(config, ONE_RANK, coordinator, NeverStop(), stack)


def test_a_run_publishes_every_version_and_checkpoints_and_finishes(tmp_path: Path) -> None:
    coordinator = FakeCoordinator()
    run_training(run_config(tmp_path), coordinator)
    assert coordinator.calls == [
        "open 0",
        "publish 1.0",
        "publish 1.1",
        "publish 1.2",
        "checkpoint 2",
        "publish 1.3",
        "checkpoint 3",
        "finish 3",
    ]
