import json
import logging
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.evaluation.config import EvalConfig
from actors.evaluation.policies import named_policies
from learner.algorithms.recipe import Advantage, Preset
from learner.config import RunConfig, ScheduleConfig
from learner.export import export
from learner.training.algorithm_config import AlgorithmConfig
from learner.training.batch import Batch, Group
from learner.training.checkpoint import newest
from learner.training.config import CheckpointConfig, Device, OptimizerConfig, TrainingConfig
from learner.training.coordinator import NextBatch
from learner.training.parallel import Ranks
from learner.training.start import make_updater, train
from penstock.config import to_toml
from penstock.errors import ConfigError, PenstockError
from penstock.trajectory import Reward, VersionSpan
from tests.tiny_policy import write_tiny_policy
from tests.trainer_fakes import VERSION, FakeCoordinator, NeverStop, make_batch, make_trajectory

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


def run_config(
    tmp_path: Path, *, name: str = "run", num_steps: int = 3, algorithm: AlgorithmConfig | None = None
) -> RunConfig:
    run_dir = tmp_path / name
    run_dir.mkdir(exist_ok=True)
    policy = tmp_path / "policy"
    if not policy.exists():
        write_tiny_policy(policy)
    config = RunConfig(
        policy=policy,
        environments=("127.0.0.1:1",),
        run_dir=run_dir,
        schedule=ScheduleConfig(num_steps=num_steps),
        algorithm=algorithm or AlgorithmConfig(),
        training=TrainingConfig(
            device=Device.CPU,
            row_tokens=64,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
            checkpoint=CheckpointConfig(every_steps=2, keep=2),
        ),
    )
    (run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return config


def run_training(config: RunConfig, coordinator: FakeCoordinator) -> FakeCoordinator:
    with ExitStack() as stack:
        train(config, ONE_RANK, coordinator, NeverStop(), stack)
    return coordinator


def weights_of(config: RunConfig) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint: weights, optimiser, RNG."""
    checkpoint = newest(config.run_dir / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint.path / "rank-0-of-1.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_a_run_publishes_every_version_and_checkpoints_and_finishes(tmp_path: Path) -> None:
    coordinator = run_training(run_config(tmp_path), FakeCoordinator())
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


def test_every_step_is_reported_and_kept_as_a_line(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    coordinator = run_training(config, FakeCoordinator())
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["version"] for line in lines] == ["1.1", "1.2", "1.3"]
    assert coordinator.metrics[0] == {}
    reported = coordinator.metrics[3]
    assert reported.items() <= lines[-1].items()
    names = (
        "loss reward_mean reward_std lag_mean lag_p95 lag_max ratio_mean ratio_max ess kl entropy clip_share "
        "grad_norm learning_rate tokens step_seconds wait_seconds masked_share_positive"
    )
    assert set(names.split()) <= reported.keys()
    assert reported["reward_mean"] == 0.5
    assert reported["lag_max"] == 2.0


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run_config(tmp_path, name="whole", num_steps=5)
    run_training(whole, FakeCoordinator())
    halves = run_config(tmp_path, name="halves", num_steps=5)
    first = run_training(halves, FakeCoordinator(stop_at=3))
    second = run_training(halves, FakeCoordinator(epoch=2))
    assert first.calls[-1] == "checkpoint 3"
    assert second.calls[:2] == ["open 3", "publish 2.3"]
    assert_same(weights_of(whole), weights_of(halves))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(tmp_path)
    run_training(config, FakeCoordinator())
    shard = config.run_dir / "checkpoints" / "step-00000003" / "rank-0-of-1.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with caplog.at_level(logging.ERROR):
        again = run_training(config, FakeCoordinator(epoch=2))
    assert "is damaged and is not used" in caplog.text
    assert again.calls[0] == "open 2"
    assert again.calls[-1] == "finish 3"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    config = run_config(tmp_path, num_steps=7)
    run_training(config, FakeCoordinator())
    assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000007",
    ]


def test_an_operator_s_request_is_served_once(tmp_path: Path) -> None:
    coordinator = run_training(run_config(tmp_path, num_steps=2), FakeCoordinator(checkpoint_at=1))
    assert coordinator.calls == [
        "open 0",
        "publish 1.0",
        "publish 1.1",
        "checkpoint 1",
        "publish 1.2",
        "checkpoint 2",
        "finish 2",
    ]


def test_the_exported_folder_has_the_checkpoint_s_logits(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    run_training(config, FakeCoordinator())
    assert export(config.run_dir, tmp_path / "out") == 3
    assert export(config.run_dir, tmp_path / "older", step=2) == 2
    trained = make_updater(config, ONE_RANK)
    from learner.training.checkpoint import Checkpoints

    Checkpoints(config.run_dir / "checkpoints", trained, keep=2).resume()
    token_ids = torch.arange(3, 20)[None]
    default = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    default.load_state_dict(trained.policy.causal_lm.state_dict())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(exported(token_ids).logits, default(token_ids).logits)
    older = AutoModelForCausalLM.from_pretrained(tmp_path / "older")
    assert not torch.equal(older(token_ids).logits, exported(token_ids).logits)


def test_an_export_names_what_is_missing(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    with pytest.raises(ConfigError, match="has no sound checkpoint"):
        export(config.run_dir, tmp_path / "out")
    run_training(config, FakeCoordinator())
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 9; it has \[2, 3\]"):
        export(config.run_dir, tmp_path / "out", step=9)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not a policy folder"):
        export(config.run_dir, tmp_path / "full")


def test_an_evaluation_of_a_run_that_goes_on_leaves_out_checkpoints_that_are_deleted_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(tmp_path)
    run_training(config, FakeCoordinator())
    policies = named_policies(EvalConfig(run=config.run_dir, environment=("127.0.0.1:1",)))
    assert next(policies)[0] == "step 2"
    shutil.rmtree(config.run_dir / "checkpoints" / "step-00000003")
    assert list(policies) == []
    assert "step 3 is left out" in caplog.text


def poisoned(step: int) -> Batch:
    """A reward that no float32 holds makes the loss overflow."""
    groups = []
    for group in make_batch(step).groups:
        first, *others = group.trajectories
        trajectories = (replace(first, reward=Reward.valid(1e300)), *others)
        groups.append(Group(group_id=group.group_id, trajectories=trajectories))
    return Batch(step=step, groups=tuple(groups))


@pytest.mark.parametrize("updates_per_step", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(
    tmp_path: Path, updates_per_step: int
) -> None:
    algorithm = AlgorithmConfig(advantage=Advantage.GROUP_MEAN, updates_per_step=updates_per_step)
    served: list[int] = []

    def poisoned_once(step: int) -> Batch:
        served.append(step)
        return poisoned(step) if served.count(step) == 1 and step == 1 else make_batch(step)

    config = run_config(tmp_path, name="poisoned", algorithm=algorithm)
    coordinator = run_training(config, FakeCoordinator(make=poisoned_once))
    assert "skip 1" in coordinator.calls
    clean = run_config(tmp_path, name="clean", algorithm=algorithm)
    run_training(clean, FakeCoordinator())
    assert_same(weights_of(config), weights_of(clean))


def test_three_skips_in_a_row_stop_the_run_and_name_the_trajectories(tmp_path: Path) -> None:
    config = run_config(tmp_path, algorithm=AlgorithmConfig(advantage=Advantage.GROUP_MEAN))
    coordinator = FakeCoordinator(make=poisoned)
    first = next(poisoned(0).trajectories()).trajectory_id
    with pytest.raises(PenstockError, match=f"3 steps in a row failed.*{first}"):
        run_training(config, coordinator)
    assert coordinator.calls == ["open 0", "publish 1.0", "skip 0", "skip 0", "skip 0"]


def test_weights_that_are_not_finite_are_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blow_up(optimizer: torch.optim.Optimizer) -> None:
        next(iter(optimizer.param_groups[0]["params"])).data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", blow_up)
    coordinator = FakeCoordinator()
    with pytest.raises(PenstockError, match=r"version 1\.1 is not published: 1 tensors are not finite"):
        run_training(run_config(tmp_path), coordinator)
    assert coordinator.calls == ["open 0", "publish 1.0"]


def test_lag_counts_from_the_oldest_version_in_a_trajectory(tmp_path: Path) -> None:
    two, five = VERSION._replace(step=2), VERSION._replace(step=5)
    mixed = (VersionSpan(two, 2), VersionSpan(five, 3))
    older = (VersionSpan(two, 5),)
    trajectories = (make_trajectory(versions=mixed), make_trajectory(seed=1, reward=0.0, versions=older))

    def make(step: int) -> Batch:
        return Batch(step=step, groups=(Group(group_id=0, trajectories=trajectories),))

    coordinator = run_training(run_config(tmp_path, num_steps=6), FakeCoordinator(make=make))
    assert [coordinator.metrics[step + 1]["lag_max"] for step in range(6)] == [0, 0, 0, 1, 2, 3]
    assert "mismatch_kl" not in coordinator.metrics[2]
    assert np.isfinite(coordinator.metrics[3]["mismatch_kl"])


def test_more_updates_a_step_use_one_proximal_policy(tmp_path: Path) -> None:
    config = run_config(tmp_path, num_steps=1, algorithm=AlgorithmConfig(updates_per_step=3))
    coordinator = run_training(config, FakeCoordinator())
    single = run_training(run_config(tmp_path, name="single", num_steps=1), FakeCoordinator())
    for name in ("ratio_mean", "ess", "kl"):
        assert coordinator.metrics[1][name] == pytest.approx(single.metrics[1][name], rel=1e-5)


@pytest.mark.parametrize("preset", [Preset.PPO, Preset.ONLINE_DPO])
def test_an_interrupted_run_goes_on_with_its_critic_and_its_first_policy(
    tmp_path: Path, preset: Preset
) -> None:
    """PPO's critic is checkpointed with the policy; a reference is the first policy again, not the resumed one."""
    algorithm = AlgorithmConfig(preset=preset)
    whole = run_config(tmp_path, name="whole", num_steps=4, algorithm=algorithm)
    run_training(whole, FakeCoordinator())
    halves = run_config(tmp_path, name="halves", num_steps=4, algorithm=algorithm)
    run_training(halves, FakeCoordinator(stop_at=2))
    run_training(halves, FakeCoordinator(epoch=2))
    assert_same(weights_of(whole), weights_of(halves))


def test_a_critic_s_checkpoint_that_is_missing_is_named(tmp_path: Path) -> None:
    config = run_config(tmp_path, algorithm=AlgorithmConfig(preset=Preset.PPO))
    run_training(config, FakeCoordinator(stop_at=2))
    shutil.rmtree(config.run_dir / "critic" / "step-00000002")
    with pytest.raises(ConfigError, match=r"critic/step-00000002: cannot be resumed from"):
        run_training(config, FakeCoordinator(epoch=2))


def test_what_a_trainer_that_died_had_written_of_a_checkpoint_is_deleted(tmp_path: Path) -> None:
    """Also of the critic's, which would else be there for good."""
    config = run_config(tmp_path, num_steps=2, algorithm=AlgorithmConfig(preset=Preset.PPO))
    halves = [config.run_dir / name / ".step-00000009.writing" for name in ("checkpoints", "critic")]
    for half in halves:
        half.mkdir(parents=True)
    run_training(config, FakeCoordinator())
    assert not any(half.exists() for half in halves)


def test_a_checkpoint_that_is_written_in_the_background_is_named_while_no_batch_comes(tmp_path: Path) -> None:
    """Trained steps would else be lost with a trainer that dies while it waits."""
    config = run_config(tmp_path, num_steps=3)
    checkpoint = CheckpointConfig(every_steps=2, keep=2, in_background=True)
    config = replace(config, training=replace(config.training, checkpoint=checkpoint))
    give_up = time.monotonic() + 20.0

    class Starving(FakeCoordinator):
        def next_batch(self, *, epoch: int, step: int, wait_seconds: float) -> NextBatch:
            if step < 2 or "checkpoint 2" in self.calls or time.monotonic() > give_up:
                return super().next_batch(epoch=epoch, step=step, wait_seconds=wait_seconds)
            time.sleep(0.01)
            return NextBatch(batch=None, waiting="no actors")

    run_training(config, Starving())
    assert time.monotonic() < give_up
