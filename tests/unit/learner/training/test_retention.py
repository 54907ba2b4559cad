"""The newest checkpoints stay to go on from, and the best by a metric to export."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest

from learner.config import RunConfig
from learner.export import export
from learner.training.checkpoint import checkpoint_folders
from learner.training.config import CheckpointConfig, Mode
from learner.training.retention import MANIFEST, Means, Retention, metrics_of
from penstock.config import to_toml
from penstock.errors import ConfigError
from tests.trainer_fakes import FakeCoordinator
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


def keeping(tmp_path: Path, *, num_steps: int, metric: str = "loss", mode: Mode = Mode.MIN) -> RunConfig:
    """A run that keeps the newest checkpoint, and the two best by the loss."""
    config = run_config(tmp_path, num_steps=num_steps)
    checkpoint = CheckpointConfig(every_steps=1, keep=1, keep_best=2, metric=metric, mode=mode)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, checkpoint=checkpoint))
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


def test_a_metric_that_steps_do_not_have_ends_the_run_at_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"metric is rewards, which steps of this run do not have.* reward_mean"
    ):
        run_training(keeping(tmp_path, num_steps=3, metric="rewards"), FakeCoordinator())


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
