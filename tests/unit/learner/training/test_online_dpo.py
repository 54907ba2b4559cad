"""Online preference optimisation: pairs from groups, on a tiny policy."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner.algorithms.preference_recipe import OnlineRecipe, PreferenceLoss
from learner.algorithms.recipe import Preset
from learner.training.algorithm_config import AlgorithmConfig
from learner.training.batch import Batch, Group
from learner.training.config import OptimizerConfig
from learner.training.model import load_policy
from learner.training.online_dpo import OnlineDpo, best_and_worst
from learner.training.optimizer import make_optimizer
from learner.training.parallel import Ranks
from learner.training.preparation import token_sequence
from learner.training.reference import Reference
from learner.training.updater import Updater
from penstock.trajectory import Reward
from tests.tiny_policy import ADAM_EPS, write_tiny_policy
from tests.trainer_fakes import VERSION, make_batch, make_trajectory

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


def rewarded(*rewards: float) -> Group:
    trajectories = tuple(make_trajectory(seed=i, reward=reward) for i, reward in enumerate(rewards))
    return Group(group_id=0, trajectories=trajectories)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("policy"), num_layers=1)


def make_updater(folder: Path, *, row_tokens: int = 256) -> Updater:
    policy = load_policy(folder)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3, eps=ADAM_EPS))
    return Updater(policy, optimizer, ONE_RANK, row_tokens=row_tokens, max_grad_norm=1.0)


def make_algorithm(updater: Updater, **settings) -> OnlineDpo:  # type: ignore[no-untyped-def]
    recipe = AlgorithmConfig(preset=Preset.ONLINE_DPO, **settings).recipe()
    assert isinstance(recipe, OnlineRecipe)
    reference = Reference(updater) if recipe.has_reference else None
    return OnlineDpo(updater, recipe, seed=0, reference=reference)


def test_a_group_s_best_and_worst_answers_are_a_pair() -> None:
    pair = best_and_worst(rewarded(0.5, 2.0, -1.0, 0.0))
    assert pair is not None
    assert [trajectory.reward.value for trajectory in pair] == [2.0, -1.0]
    assert best_and_worst(rewarded(1.0, 1.0)) is None


@pytest.mark.parametrize("loss", [PreferenceLoss.SIGMOID, PreferenceLoss.KTO, PreferenceLoss.SIMPO])
def test_the_better_answer_becomes_likelier_than_the_worse(folder: Path, loss: PreferenceLoss) -> None:
    updater = make_updater(folder)
    algorithm = make_algorithm(updater, loss=loss)
    batch = Batch(step=0, groups=(rewarded(1.0, 0.0, 0.5), rewarded(0.3, 0.2)))
    for _ in range(10):
        report = algorithm.step(batch, VERSION, learning_rate=3e-3)
        assert report.failure == ""
    assert report.metrics["accuracy"] == 1.0
    names = (
        "loss grad_norm lag_mean lag_p95 lag_max ratio_mean ratio_max ess kl mismatch_kl reward_margin pairs"
    )
    assert set(names.split()) <= report.metrics.keys()
    best, worst = updater.score([token_sequence(t) for t in batch.groups[0].trajectories[:2]])
    assert best.sum() > worst.sum()


def test_equal_rewards_leave_the_weights_as_they_are(folder: Path) -> None:
    updater = make_updater(folder)
    before = [p.detach().clone() for p in updater.policy.parameters()]
    batch = Batch(step=0, groups=(rewarded(1.0, 1.0),))
    report = make_algorithm(updater).step(batch, VERSION, learning_rate=1e-3)
    assert report.failure == ""
    assert report.metrics["pairs"] == 0
    for got, expected in zip(updater.policy.parameters(), before, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("updates", [1, 2])
def test_packing_changes_neither_metrics_nor_weights(folder: Path, updates: int) -> None:
    results = []
    for row_tokens in (256, 16):
        updater = make_updater(folder, row_tokens=row_tokens)
        algorithm = make_algorithm(updater, updates_per_step=updates)
        for step in range(2):
            metrics = algorithm.step(make_batch(step), VERSION, learning_rate=1e-3).metrics
        results.append((metrics, torch.cat([p.detach().flatten() for p in updater.policy.parameters()])))
    (metrics, weights), (others, other_weights) = results
    assert others == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(other_weights, weights, rtol=0, atol=2e-5)


def test_a_step_that_is_not_finite_changes_nothing(folder: Path) -> None:
    updater = make_updater(folder)
    with torch.no_grad():
        next(iter(updater.policy.parameters())).fill_(float("nan"))
    group = rewarded(1.0, 0.0)
    trajectories = tuple(replace(t, reward=Reward.valid(float(i))) for i, t in enumerate(group.trajectories))
    batch = Batch(step=0, groups=(Group(group_id=0, trajectories=trajectories),))
    second = [p.detach().clone() for p in updater.policy.parameters()][1]
    report = make_algorithm(updater).step(batch, VERSION, learning_rate=1e-3)
    assert "not finite" in report.failure
    assert torch.equal(list(updater.policy.parameters())[1], second)
