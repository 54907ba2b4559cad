"""Policy gradients on a tiny policy: every preset trains, every setting changes something, packing changes nothing."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.algorithms.recipe import PRESETS, Correction, Divergence, Preset, Proximal, Recipe
from learner.training.algorithm_config import AlgorithmConfig
from learner.training.batch import Batch, Group
from learner.training.config import OptimizerConfig
from learner.training.critic import Critic
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.parallel import Ranks
from learner.training.policy import Policy
from learner.training.policy_gradient import PolicyGradient
from learner.training.preparation import behaviour_logprobs, token_sequence
from learner.training.reference import Reference
from learner.training.scalar import load_scalar_model
from learner.training.updater import Updater
from penstock.errors import ConfigError
from penstock.trajectory import PolicyVersion, VersionSpan
from tests.tiny_policy import ADAM_EPS, write_tiny_policy
from tests.trainer_fakes import make_batch, make_trajectory

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
MAX_TOKENS = 9
"""So that some answers of these batches are overlong."""
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
OTHERS: dict[str, tuple[float, ...]] = {
    "updates_per_step": (3,),
    "clip_low": (0.05, 1e-3),
    "clip_high": (0.05, 1e-3),
    "dual_clip": (1.01,),
    "correction_low": (0.999,),
    "correction_high": (1.001,),
    "correction_threshold": (0.0001,),
    "aggregation_tokens": (5,),
    "overlong_share": (0.9,),
    "overlong_penalty": (3.0,),
    "kl_coefficient": (0.5,),
    "gae_gamma": (0.5,),
    "gae_lambda": (0.5,),
    "critic_learning_rate": (1e-2,),
}
"""Of each number, values that no preset has; one of them binds on these batches."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One tiny policy, put back to its first weights for each training; and the batches that it is trained on."""

    folder: Path
    policy: Policy
    first: list[torch.Tensor]
    batches: list[Batch]

    def updater(self, *, row_tokens: int = 256) -> Updater:
        with torch.no_grad():
            for parameter, values in zip(self.policy.parameters(), self.first, strict=True):
                parameter.copy_(values)
        optimizer = make_optimizer(self.policy, OptimizerConfig(learning_rate=1e-3, eps=ADAM_EPS))
        return Updater(self.policy, optimizer, ONE_RANK, row_tokens=row_tokens, max_grad_norm=1.0)

    def critic(self, recipe: Recipe, *, row_tokens: int) -> Critic:
        model = load_scalar_model(self.folder)
        optimizer = make_optimizer(model, OptimizerConfig(learning_rate=1e-3, eps=ADAM_EPS))
        updater = Updater(model, optimizer, ONE_RANK, row_tokens=row_tokens, max_grad_norm=1.0)
        rate = recipe.critic_learning_rate
        return Critic(updater, learning_rate=rate, gamma=recipe.gae_gamma, lam=recipe.gae_lambda)

    def train(self, settings: dict[str, Any], *, row_tokens: int = 256, steps: int = 1):  # type: ignore[no-untyped-def]
        """Metrics of the last step, and the weights after it."""
        updater = self.updater(row_tokens=row_tokens)
        recipe = AlgorithmConfig(**settings).recipe()
        reference = Reference(updater) if recipe.has_reference else None
        critic = self.critic(recipe, row_tokens=row_tokens) if recipe.has_critic else None
        algorithm = PolicyGradient(
            updater, recipe, max_tokens=MAX_TOKENS, seed=0, reference=reference, critic=critic
        )
        for batch in self.batches[:steps]:
            report = algorithm.step(batch, NOW, learning_rate=1e-3)
            assert report.failure == ""
        return report.metrics, torch.cat([p.detach().flatten() for p in self.policy.parameters()])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = write_tiny_policy(tmp_path_factory.mktemp("policy"), num_layers=1)
    policy = load_policy(folder)
    made = Bench(
        folder=folder, policy=policy, first=[p.detach().clone() for p in policy.parameters()], batches=[]
    )
    made.batches.extend(lagging_batch(made.updater(), step) for step in range(2))
    return made


def lagging_batch(updater: Updater, step: int) -> Batch:
    """Tokens of several versions, sampled by policies near the updater's own; rewards of any size."""
    draw = np.random.default_rng(step)
    groups = []
    for group in make_batch(step, num_groups=2).groups:
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


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_changes_neither_metrics_nor_weights(bench: Bench, name: str) -> None:
    metrics, weights = bench.train(CONFIGS[name], steps=2)
    others, other_weights = bench.train(CONFIGS[name], row_tokens=16, steps=2)
    assert others == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(other_weights, weights, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_loss_reports_its_health(bench: Bench, name: str) -> None:
    metrics, _ = bench.train(CONFIGS[name])
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
def test_every_number_that_is_accepted_changes_the_weights(bench: Bench, name: str) -> None:
    """A knob that does nothing is a defect: it is either refused or seen in what is trained."""
    _, weights = bench.train(CONFIGS[name], steps=2)
    accepted = []
    for knob, values in OTHERS.items():
        try:
            others = [bench.train(CONFIGS[name] | {knob: value}, steps=2)[1] for value in values]
        except ConfigError:
            continue
        assert any(not torch.equal(other, weights) for other in others), knob
        accepted.append(knob)
    assert "updates_per_step" in accepted


def test_a_reference_scores_the_first_policy_and_puts_the_learner_s_back(bench: Bench) -> None:
    updater = bench.updater()
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


def test_a_mismatch_does_not_count_how_far_the_step_s_own_updates_have_gone(bench: Bench) -> None:
    """Without scores of the start, only the first minibatch sees the policy that the engine had."""
    settings = {"preset": Preset.GRPO, "proximal": Proximal.BEHAVIOUR, "updates_per_step": 4}
    recipe = AlgorithmConfig(**settings).recipe()
    found = []
    for learning_rate in (0.0, 0.1):
        algorithm = PolicyGradient(bench.updater(), recipe, max_tokens=MAX_TOKENS, seed=0)
        found.append(algorithm.step(bench.batches[0], NOW, learning_rate=learning_rate).metrics)
    still, moving = found
    assert moving["kl"] > 1.1 * still["kl"]
    assert moving["mismatch_kl"] == still["mismatch_kl"]
