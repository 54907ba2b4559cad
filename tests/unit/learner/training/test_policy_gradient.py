"""Policy gradients on a tiny policy: every preset trains, every setting changes something, packing changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.algorithms.recipe import PRESETS, Correction, Divergence, Preset, Proximal
from learner.training.algorithm_config import AlgorithmConfig
from learner.training.batch import Batch, Group
from learner.training.config import OptimizerConfig
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.parallel import Ranks
from learner.training.policy_gradient import PolicyGradient
from learner.training.preparation import behaviour_logprobs, token_sequence
from learner.training.reference import Reference
from learner.training.updater import Updater
from penstock.errors import ConfigError
from penstock.trajectory import PolicyVersion, VersionSpan
from tests.tiny_policy import write_tiny_policy
from tests.trainer_fakes import make_batch, make_trajectory

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
MAX_TOKENS = 12
NOW = PolicyVersion(1, 6)
WITH_REFERENCE = {"kl": Divergence.K3, "kl_coefficient": 0.1}

CONFIGS: dict[str, dict[str, Any]] = {str(preset): {"preset": preset} for preset in PRESETS} | {
    "kl_k1": {"preset": Preset.GRPO, "kl": Divergence.K1, "kl_coefficient": 0.1},
    "kl_k2": {"preset": Preset.GRPO, "kl": Divergence.K2, "kl_coefficient": 0.1},
    "kl_k3": {"preset": Preset.GRPO, **WITH_REFERENCE},
    "m2po": {"preset": Preset.GRPO, "correction": Correction.SECOND_MOMENT, "correction_threshold": 0.01},
    "a3po": {"preset": Preset.DECOUPLED_PPO, "proximal": Proximal.INTERPOLATED, "correction_high": 1.1},
    "icepop": {"preset": Preset.DECOUPLED_PPO, "correction": Correction.MASK, "correction_high": 1.2},
    "two_updates": {"preset": Preset.DECOUPLED_PPO, "updates_per_step": 2, "correction_high": 1.1},
}
OTHER: dict[str, Any] = {
    "updates_per_step": 3,
    "clip_low": 1e-5,
    "clip_high": 1e-5,
    "dual_clip": 1.01,
    "correction_low": 0.999,
    "correction_high": 1.001,
    "correction_threshold": 0.0001,
    "aggregation_tokens": 5,
    "overlong_share": 0.9,
    "overlong_penalty": 3.0,
    "kl_coefficient": 0.5,
}
"""Of each number, a value that no preset has and that binds on these batches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("policy"), num_layers=1)


def make_updater(folder: Path, *, row_tokens: int = 256) -> Updater:
    policy = load_policy(folder)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3))
    return Updater(policy, optimizer, ONE_RANK, row_tokens=row_tokens, max_grad_norm=1.0)


def lagging_batch(updater: Updater, step: int) -> Batch:
    """Tokens of several versions, sampled by policies near the updater's own; rewards of any size."""
    batch = make_batch(step, num_groups=2)
    draw = np.random.default_rng(step)
    groups = []
    for group in batch.groups:
        members = []
        for trajectory in group.trajectories:
            spans = (VersionSpan(PolicyVersion(1, 3), 1), VersionSpan(NOW, trajectory.num_sampled - 1))
            logprobs = trajectory.logprobs.copy()
            (scores,) = updater.score([token_sequence(trajectory)])
            logprobs[trajectory.loss_mask == 1] = np.minimum(scores + draw.normal(0, 0.2, len(scores)), 0)
            reward = replace(trajectory.reward, value=float(draw.normal()))
            versions = spans if trajectory.num_sampled > 1 else spans[:1]
            members.append(replace(trajectory, versions=versions, logprobs=logprobs, reward=reward))
        groups.append(Group(group_id=group.group_id, trajectories=tuple(members)))
    return Batch(step=NOW.step, groups=tuple(groups))


def train(folder: Path, settings: dict[str, Any], *, row_tokens: int = 256, steps: int = 2):  # type: ignore[no-untyped-def]
    """Metrics of the last step, and the weights after it."""
    updater = make_updater(folder, row_tokens=row_tokens)
    recipe = AlgorithmConfig(**settings).recipe()
    batches = [lagging_batch(updater, step) for step in range(steps)]
    reference = Reference(updater) if recipe.has_reference else None
    algorithm = PolicyGradient(updater, recipe, max_tokens=MAX_TOKENS, seed=0, reference=reference)
    for batch in batches:
        report = algorithm.step(batch, NOW, learning_rate=1e-3)
        assert report.failure == ""
    return report.metrics, torch.cat([p.detach().flatten() for p in updater.policy.parameters()])


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_changes_neither_metrics_nor_weights(folder: Path, name: str) -> None:
    metrics, weights = train(folder, CONFIGS[name])
    others, other_weights = train(folder, CONFIGS[name], row_tokens=16)
    assert others == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(other_weights, weights, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_loss_reports_its_health(folder: Path, name: str) -> None:
    metrics, _ = train(folder, CONFIGS[name], steps=1)
    names = (
        "loss grad_norm lag_mean lag_p95 lag_max ratio_mean ratio_max ess kl entropy clip_share "
        "masked_share_positive masked_share_negative mismatch_kl reward_mean"
    )
    assert set(names.split()) <= metrics.keys()
    assert ("reference_kl" in metrics) == (name in ("kl_k2", "kl_k3"))
    assert metrics["lag_max"] == 3.0
    assert metrics["ess"] < 1.0
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_that_is_accepted_changes_the_weights(folder: Path, name: str) -> None:
    """A knob that does nothing is a defect: it is either refused or seen in what is trained."""
    _, weights = train(folder, CONFIGS[name], steps=1)
    changed = []
    for knob, value in OTHER.items():
        try:
            _, others = train(folder, CONFIGS[name] | {knob: value}, steps=1)
        except ConfigError:
            continue
        assert not torch.equal(others, weights), knob
        changed.append(knob)
    assert "updates_per_step" in changed


def test_a_reference_scores_the_first_policy_and_puts_the_learner_s_back(folder: Path) -> None:
    updater = make_updater(folder)
    sequences = [token_sequence(trajectory) for trajectory in make_batch().trajectories()]
    first = updater.score(sequences)
    reference = Reference(updater)
    with torch.no_grad():
        for parameter in updater.policy.parameters():
            parameter.mul_(1.1)
    later = updater.score(sequences)
    for got, expected in zip(reference.score(sequences), first, strict=True):
        assert got.tolist() == expected.tolist()
    for got, expected in zip(updater.score(sequences), later, strict=True):
        assert got.tolist() == expected.tolist()


def test_missing_log_probabilities_are_never_filled_in() -> None:
    trajectory = make_trajectory()
    with pytest.raises(ValueError, match="8 log-probabilities for 9 tokens"):
        behaviour_logprobs(replace(trajectory, logprobs=trajectory.logprobs[:-1]))
