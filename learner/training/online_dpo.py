"""Preference optimisation online: pairs are built from groups as they stream in.

The best and the worst answer of a group are a pair; a group with equal rewards gives none.
The loss knows the learner policy and the reference only, so that lag does not bias it;
how far the policies that sampled were away is reported as for every other algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from learner.algorithms.health import effective_sample_share, mismatch, ratio_health
from learner.algorithms.preference_recipe import OnlineRecipe, PreferenceLoss
from learner.training.batch import Batch, Group, batch_metrics
from learner.training.policy import context_of
from learner.training.preference import (
    Pair,
    PairReport,
    mismatched,
    reference_of,
    update_policy,
)
from learner.training.preparation import prepare, token_sequence
from learner.training.reference import Reference
from learner.training.step import StepReport, describe_failure, minibatches, update_metrics
from learner.training.updater import Snapshot, Updater
from penstock.trajectory import PolicyVersion, Trajectory


class OnlineDpo:
    """The algorithm as the loop sees it."""

    def __init__(
        self, updater: Updater, recipe: OnlineRecipe, *, seed: int, reference: Reference | None = None
    ) -> None:
        """reference: only for a loss that has one."""
        assert (reference is not None) == recipe.has_reference
        self._updater = updater
        self._recipe = recipe
        self._seed = seed
        self._reference = reference

    def step(self, batch: Batch, version: PolicyVersion, *, learning_rate: float) -> StepReport:
        chosen = [pair for group in batch.groups if (pair := best_and_worst(group)) is not None]
        measured = batch_metrics(batch) | {"pairs": float(len(chosen)), "learning_rate": learning_rate}
        if not chosen:  # equal rewards everywhere: the next version has the same weights
            return StepReport(metrics=measured | {"loss": 0.0, "grad_norm": 0.0})
        measured |= self._health(chosen, version)
        pairs = [Pair(chosen=token_sequence(best), rejected=token_sequence(worst)) for best, worst in chosen]
        reports = self._updates(pairs, batch.step, learning_rate)
        failed = next((report for report in reports if not report.update.is_finite), None)
        if failed is not None:
            return StepReport(metrics={}, failure=describe_failure(failed.update))
        means = {
            name: float(np.mean([report.metrics[name] for report in reports])) for name in reports[0].metrics
        }
        return StepReport(metrics=measured | update_metrics([report.update for report in reports]) | means)

    def _updates(self, pairs: Sequence[Pair], step: int, learning_rate: float) -> list[PairReport]:
        """One report an update. After one that isn't finite everything is as it was before the step."""
        recipe = self._recipe.preference
        score = self._reference.score if self._reference else self._updater.score
        is_kto = recipe.loss is PreferenceLoss.KTO
        others = mismatched(pairs, max_tokens=context_of(self._updater.policy)) if is_kto else []
        references = reference_of(score, pairs, recipe, others=others)
        parts = minibatches(
            len(pairs), updates_per_step=self._recipe.updates_per_step, seed=self._seed, step=step
        )
        before = Snapshot(self._updater) if len(parts) > 1 else None
        reports = []
        for part in parts:
            report = update_policy(
                self._updater,
                [pairs[i] for i in part],
                references and [references[i] for i in part],
                recipe,
                others=[others[i] for i in part] if others else (),
                learning_rate=learning_rate,
            )
            reports.append(report)
            if not report.update.is_finite:
                if before is not None:
                    before.restore()
                break
        return reports

    def _health(
        self, chosen: Sequence[tuple[Trajectory, Trajectory]], version: PolicyVersion
    ) -> dict[str, float]:
        """How far the policy is from those that sampled the pairs."""
        flat = [trajectory for pair in chosen for trajectory in pair]
        prepared = [prepare(trajectory, np.zeros(trajectory.num_sampled), version) for trajectory in flat]
        current_S = _joined(self._updater.score([item.sequence for item in prepared]))
        behaviour_S = _joined([item.behaviour_S for item in prepared])
        same_S = torch.from_numpy(np.concatenate([item.same_version_S for item in prepared]))
        sums = ratio_health(current_S, behaviour_S) | mismatch(current_S, behaviour_S, same_S)
        totals = {name: float(value) for name, value in sums.items()}
        num_tokens = len(current_S)
        report = {
            "ratio_mean": totals["ratio_sum"] / num_tokens,
            "ratio_max": totals["ratio_max"],
            "ess": effective_sample_share(totals["ratio_sum"], totals["ratio_square_sum"], num_tokens),
            "kl": totals["kl_sum"] / num_tokens,
        }
        if totals["same_version_sum"]:
            report["mismatch_kl"] = totals["mismatch_kl_sum"] / totals["same_version_sum"]
        return report


def best_and_worst(group: Group) -> tuple[Trajectory, Trajectory] | None:
    """The trajectories of highest and of lowest reward, the first of each; None if all rewards are equal."""
    best = max(group.trajectories, key=_reward)
    worst = min(group.trajectories, key=_reward)
    return None if _reward(best) == _reward(worst) else (best, worst)


def _reward(trajectory: Trajectory) -> float:
    assert trajectory.reward.value is not None
    return trajectory.reward.value


def _joined(parts: Sequence[NDArray[np.float32]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))
