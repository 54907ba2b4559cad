"""The newest checkpoints stay to go on from, and the best by a metric to export."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest

from learner.config import RunConfig
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.coordinator.evaluation.records import EvaluationState
from learner.coordinator.evaluation.result import EvaluationResult
from learner.export import export
from learner.training.batch import Batch, Group
from learner.training.checkpoint import checkpoint_folders
from learner.training.config import CheckpointConfig, Mode, TrainingConfig
from learner.training.retention import MANIFEST, Means, Retention, metrics_of
from penstock.config import to_toml
from penstock.errors import ConfigError
from penstock.scores import MEAN, Score
from penstock.trajectory import PolicyVersion, VersionSpan
from tests.trainer_fakes import FakeCoordinator, make_trajectory
from tests.unit.learner.training.test_loop import run_config, run_training


def write_manifests(folder: Path, rewards: dict[int, float | None]) -> list[Path]:
    """Checkpoints of these steps and rewards, newest first."""
    for step, reward in rewards.items():
        path = folder / f"step-{step:08d}"
        path.mkdir()
        metrics = {} if reward is None else {"metrics": {"reward_mean": reward}}
        (path / MANIFEST).write_text(json.dumps({"step": step, **metrics}))
    return checkpoint_folders(folder)


def steps(paths: list[Path]) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in paths]


def test_the_best_stay_beside_the_newest(tmp_path: Path) -> None:
    paths = write_manifests(tmp_path, {1: 0.9, 2: 0.1, 3: 0.8, 4: 0.2, 5: 0.3})
    assert steps(Retention(keep=2).stale(paths)) == [3, 2, 1]
    assert steps(Retention(keep=2, keep_best=1).stale(paths)) == [3, 2]
    assert steps(Retention(keep=2, keep_best=1, mode=Mode.MIN).stale(paths)) == [3, 1]
    assert steps(Retention(keep=1, keep_best=3).stale(paths)) == [4, 2]


def test_of_equal_ones_the_newer_is_better_and_one_without_the_metric_is_never_best(tmp_path: Path) -> None:
    paths = write_manifests(tmp_path, {1: 0.5, 2: 0.5, 3: None, 4: 0.1})
    assert steps(Retention(keep=1).best_first(paths)) == [2, 1, 4]
    assert steps(Retention(keep=1, keep_best=9).stale(paths)) == [3]
    (paths[-1] / MANIFEST).write_text("{ torn")
    assert metrics_of(paths[-1]) == {}


def test_a_metric_is_its_mean_since_the_checkpoint_before() -> None:
    means = Means()
    means.add({"reward_mean": 1.0, "kl": math.nan})
    means.add({"reward_mean": 2.0, "kl": 3.0})
    assert means.take() == {"reward_mean": 1.5, "kl": 3.0}
    means.add({"reward_mean": 7.0})
    assert means.take() == {"reward_mean": 7.0}


def keeping(
    tmp_path: Path,
    *,
    num_steps: int,
    metric: str = "loss",
    every_steps: int = 1,
    mode: Mode = Mode.MIN,
    evaluation: EvaluationConfig | None = None,
) -> RunConfig:
    """A run that keeps the newest checkpoint, and the two best by the loss."""
    config = run_config(tmp_path, num_steps=num_steps)
    checkpoint = CheckpointConfig(every_steps=every_steps, keep=1, keep_best=2, metric=metric, mode=mode)
    training = dataclasses.replace(config.training, checkpoint=checkpoint)
    config = dataclasses.replace(config, training=training, evaluation=evaluation or EvaluationConfig())
    (config.run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return config


def test_a_run_keeps_its_best_over_a_restart_and_exports_the_best_that_is_sound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run_training(keeping(tmp_path, num_steps=8), FakeCoordinator(stop_at=4))
    config = keeping(tmp_path, num_steps=8)
    second = run_training(config, FakeCoordinator())
    losses = {
        step: run.metrics[step]["loss"]
        for run in (first, second)
        for step in run.metrics
        if run.metrics[step]
    }
    ranked = sorted(range(1, 9), key=lambda step: losses[step])
    folder = config.run_dir / "checkpoints"
    assert sorted(steps(checkpoint_folders(folder))) == sorted({8, *ranked[:2]})
    assert metrics_of(folder / f"step-{ranked[0]:08d}")["loss"] == losses[ranked[0]]
    assert export(config.run_dir, tmp_path / "best", best=True) == ranked[0]
    (folder / f"step-{ranked[0]:08d}" / "rank-0-of-1.safetensors").write_bytes(b"rotten")
    with caplog.at_level(logging.ERROR):
        assert export(config.run_dir, tmp_path / "next", best=True) == ranked[1]
    assert "is damaged, and the next best is taken" in caplog.text


def test_a_metric_that_steps_do_not_have_ends_the_run_at_the_first_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"metric is rewards, which steps of this run do not have.* reward_mean"
    ):
        run_training(keeping(tmp_path, num_steps=3, metric="rewards"), FakeCoordinator())


def test_a_metric_that_some_steps_do_not_have_is_waited_for(tmp_path: Path) -> None:
    sampled_by = VersionSpan(PolicyVersion(1, 1), 5)
    trajectories = tuple(
        make_trajectory(seed=seed, reward=float(seed), versions=(sampled_by,)) for seed in range(2)
    )

    def make(step: int) -> Batch:
        return Batch(step=step, groups=(Group(group_id=0, trajectories=trajectories),))

    config = keeping(tmp_path, num_steps=4, metric="mismatch_kl", every_steps=4)
    coordinator = run_training(config, FakeCoordinator(make=make))
    assert [step for step, metrics in coordinator.metrics.items() if "mismatch_kl" in metrics] == [2]
    assert export(config.run_dir, tmp_path / "best", best=True) == 4


def test_an_export_of_the_best_needs_the_metric(tmp_path: Path) -> None:
    run_training(keeping(tmp_path, num_steps=1), FakeCoordinator())
    config = keeping(tmp_path, num_steps=1, metric="rewards")
    with pytest.raises(ConfigError, match="no sound checkpoint with the metric rewards"):
        export(config.run_dir, tmp_path / "out", best=True)


@pytest.mark.parametrize(
    ("settings", "reason"), [({"keep_best": -1}, "keep_best is -1"), ({"metric": ""}, "empty")]
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        CheckpointConfig(**settings)  # type: ignore[arg-type]


EVALUATED = EvaluationConfig(every_steps=1, samples_per_prompt=4, pass_at=(1, 4))


def result(version: PolicyVersion, reward: float, *, number: int, digest: str = "d" * 64) -> str:
    """A line of evaluations.jsonl."""
    score = Score(
        num_prompts=8,
        num_answers=32,
        reward_mean=reward,
        reward_error=0.1,
        pass_at={1: reward, 4: 1 - reward},
        pass_prompts={1: 8, 4: 8},
        truncated_share=0.0,
        tokens_mean=5.0,
    )
    return EvaluationResult(
        number=number,
        version=version,
        digest=digest,
        state=EvaluationState.COMPLETE,
        num_slots=32,
        num_answers=32,
        num_missing=0,
        faults={},
        seconds=1.0,
        time=0.0,
        scores={"spell": score, "count": None, MEAN: score},
    ).to_json()


def test_the_best_by_an_evaluation_stay_and_so_do_those_that_wait_for_theirs(tmp_path: Path) -> None:
    metric = "evaluation/reward_mean"
    config = keeping(tmp_path, num_steps=6, metric=metric, mode=Mode.MAX, evaluation=EVALUATED)
    run_training(config, FakeCoordinator())
    folder, log = config.run_dir / "checkpoints", config.run_dir / "evaluations.jsonl"
    assert steps(checkpoint_folders(folder)) == [6, 5, 4, 3, 2, 1]
    rewards = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.8}
    lines = [result(PolicyVersion(1, step), reward, number=step) for step, reward in rewards.items()]
    # Of another lineage, and torn: neither says anything of these checkpoints.
    log.write_text("\n".join([*lines, result(PolicyVersion(2, 1), 1.0, number=5), '{"number": 6, "ver']))
    retention = Retention.of(config.training.checkpoint, config.run_dir)
    assert steps(retention.best_first(checkpoint_folders(folder))) == [2, 4, 1, 3]
    assert steps(retention.stale(checkpoint_folders(folder))) == [3, 1]
    assert export(config.run_dir, tmp_path / "best", best=True) == 2
    by_environment = dataclasses.replace(retention, metric="evaluation/spell/pass@4")
    assert steps(by_environment.best_first(checkpoint_folders(folder))) == [3, 1, 4, 2]
    assert (
        dataclasses.replace(retention, metric="evaluation/count/pass@4").best_first(
            checkpoint_folders(folder)
        )
        == []
    )
    with pytest.raises(
        ConfigError, match=r"environment 'spel', which is not evaluated; expected one of count, mean, spell"
    ):
        dataclasses.replace(retention, metric="evaluation/spel/pass@4").stale(checkpoint_folders(folder))


def test_a_checkpoint_is_evaluated_where_its_weights_are_as_by_a_trainer_that_went_on_from_it(
    tmp_path: Path,
) -> None:
    metric = "evaluation/reward_mean"
    config = keeping(tmp_path, num_steps=5, metric=metric, mode=Mode.MAX, evaluation=EVALUATED)
    before = run_training(config, FakeCoordinator(stop_at=3))
    after = run_training(config, FakeCoordinator(epoch=2))
    owed = [(1, 1, 0.1), (1, 2, 0.2), (2, 3, 0.9), (2, 4, 0.3), (2, 5, 0.4)]
    lines = [
        result(
            PolicyVersion(epoch, step),
            reward,
            number=step,
            digest=(before if epoch == 1 else after).manifests[step].digest,
        )
        for epoch, step, reward in owed
    ]
    (config.run_dir / "evaluations.jsonl").write_text("\n".join(lines))
    retention = Retention.of(config.training.checkpoint, config.run_dir)
    folders = checkpoint_folders(config.run_dir / "checkpoints")
    assert steps(retention.best_first(folders)) == [3, 5, 4, 2, 1]
    assert steps(retention.stale(folders)) == [4, 2, 1]


def test_a_checkpoint_that_was_made_again_waits_for_its_own_evaluation(tmp_path: Path) -> None:
    config = keeping(
        tmp_path, num_steps=4, metric="evaluation/reward_mean", mode=Mode.MAX, evaluation=EVALUATED
    )
    run_training(config, FakeCoordinator(epoch=2))
    abandoned = result(PolicyVersion(1, 4), 0.9, number=1)
    (config.run_dir / "evaluations.jsonl").write_text(abandoned)
    retention = Retention.of(config.training.checkpoint, config.run_dir)
    assert retention.stale(checkpoint_folders(config.run_dir / "checkpoints")) == []


@pytest.mark.parametrize(
    ("metric", "every_steps", "reason"),
    [
        ("evaluation/pass@3", 1, r"expected evaluation/\[NAME/\] and reward_mean or one of .*pass@1, pass@4"),
        ("evaluation/mean", 1, "one of evaluation.pass_at"),
        ("evaluation/pass@4", 0, "evaluation.every_steps is 0"),
    ],
)
def test_an_evaluation_that_never_comes_is_refused(
    tmp_path: Path, metric: str, every_steps: int, reason: str
) -> None:
    checkpoint = CheckpointConfig(keep_best=1, metric=metric)
    with pytest.raises(ConfigError, match=reason):
        RunConfig(
            policy=tmp_path,
            environments=("127.0.0.1:1",),
            run_dir=tmp_path,
            training=TrainingConfig(checkpoint=checkpoint),
            evaluation=dataclasses.replace(EVALUATED, every_steps=every_steps),
        )
