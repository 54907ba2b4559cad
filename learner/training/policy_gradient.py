"""A policy gradient on a batch of groups: preparation on the host, then one or more updates.

The batch is scored before the first update only where something needs it: the policy at
the start of the step as proximal policy of several updates, or a filter that looks at the
whole batch. With one update the policy at the start is the learner policy itself. A batch
is split into minibatches of whole trajectories, and each is one update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from learner.algorithms.aggregation import Aggregation
from learner.algorithms.corrections import second_moment_filter
from learner.algorithms.health import mismatch, summarise
from learner.algorithms.policy_gradient import Parts, RowTerms, policy_gradient_loss
from learner.algorithms.ratios import interpolated_proximal
from learner.algorithms.recipe import Correction, Divergence, Proximal, Recipe
from learner.algorithms.sequences import Sequences
from learner.algorithms.sums import Sums
from learner.training.batch import Batch, batch_metrics
from learner.training.compose import compose_aggregation, compose_parts
from learner.training.critic import Critic, critic_metrics
from learner.training.packing import PackedRow, TokenSequence
from learner.training.policy import TokenScores
from learner.training.preparation import (
    Floats,
    Prepared,
    behaviour_logprobs,
    group_advantages,
    prepare,
    shaped_rewards,
    token_sequence,
)
from learner.training.reference import Reference
from learner.training.step import StepReport, describe_failure, minibatches, total_sums, update_metrics
from learner.training.updater import Snapshot, Updater, UpdateReport
from penstock.trajectory import PolicyVersion

Scores = list[NDArray[np.float32]]
"""[S] a trajectory."""


class PolicyGradient:
    """The algorithm as the loop sees it."""

    def __init__(
        self,
        updater: Updater,
        recipe: Recipe,
        *,
        max_tokens: int,
        seed: int,
        reference: Reference | None = None,
        critic: Critic | None = None,
    ) -> None:
        """max_tokens: the run's longest answer. reference, critic: where the recipe has one, and only there."""
        assert (reference is not None) == recipe.has_reference
        assert (critic is not None) == recipe.has_critic
        self._updater = updater
        self._recipe = recipe
        self._parts = compose_parts(recipe)
        self._aggregation = compose_aggregation(recipe, max_tokens=max_tokens)
        self._max_tokens = max_tokens
        self._seed = seed
        self._reference = reference
        self._critic = critic

    def step(self, batch: Batch, version: PolicyVersion, *, learning_rate: float) -> StepReport:
        sequences = [token_sequence(trajectory) for trajectory in batch.trajectories()]
        reference = self._reference.score(sequences) if self._reference else None
        targets = None
        if self._critic is None:
            advantages = self._advantages(batch, reference)
        else:
            advantages, targets = self._critic.advantages(sequences, self._token_rewards(batch, reference))
        prepared = [
            prepare(trajectory, advantage, version)
            for trajectory, advantage in zip(batch.trajectories(), advantages, strict=True)
        ]
        start = self._updater.score(sequences) if self._is_scored else None
        keep = self._kept(prepared, start) if start else None
        return self._update(
            batch, prepared, learning_rate, reference=reference, start=start, keep=keep, targets=targets
        )

    @property
    def _is_scored(self) -> bool:
        recipe = self._recipe
        several = recipe.updates_per_step > 1 and recipe.proximal is Proximal.START
        return several or recipe.correction is Correction.SECOND_MOMENT

    def _advantages(self, batch: Batch, reference: Scores | None) -> list[NDArray[np.float64]]:
        """[S] a trajectory, the same for all of its tokens."""
        rewards = shaped_rewards(batch, self._recipe, max_tokens=self._max_tokens)
        if self._recipe.kl is Divergence.K1 and reference is not None:
            rewards = _less_divergence(rewards, batch, reference, self._recipe.kl_coefficient)
        return [
            np.full(trajectory.num_sampled, advantage)
            for trajectory, advantage in zip(
                batch.trajectories(), group_advantages(rewards, self._recipe), strict=True
            )
        ]

    def _token_rewards(self, batch: Batch, reference: Scores | None) -> list[NDArray[np.float64]]:
        """[S] a trajectory: its reward comes with its last token, and what the divergence costs with each."""
        rewards = np.concatenate(shaped_rewards(batch, self._recipe, max_tokens=self._max_tokens))
        found = []
        for number, (trajectory, reward) in enumerate(zip(batch.trajectories(), rewards, strict=True)):
            rewards_S = np.zeros(trajectory.num_sampled)
            if self._recipe.kl is Divergence.K1 and reference is not None:
                moved_S = behaviour_logprobs(trajectory).astype(np.float64) - reference[number]
                rewards_S -= self._recipe.kl_coefficient * moved_S
            rewards_S[-1] += reward
            found.append(rewards_S)
        return found

    def _kept(self, prepared: Sequence[Prepared], start: Scores) -> list[NDArray[np.bool_]] | None:
        if self._recipe.correction is not Correction.SECOND_MOMENT:
            return None
        behaviour = [item.behaviour_S for item in prepared]
        moved = np.concatenate(start).astype(np.float64) - np.concatenate(behaviour)
        keep = second_moment_filter(moved, threshold=self._recipe.correction_threshold)
        return np.split(keep, np.cumsum([len(part) for part in behaviour])[:-1])

    def _update(
        self,
        batch: Batch,
        prepared: Sequence[Prepared],
        learning_rate: float,
        *,
        reference: Scores | None,
        start: Scores | None,
        keep: list[NDArray[np.bool_]] | None,
        targets: Scores | None,
    ) -> StepReport:
        parts = minibatches(
            len(prepared), updates_per_step=self._recipe.updates_per_step, seed=self._seed, step=batch.step
        )
        before = [Snapshot(self._updater)] if len(parts) > 1 or self._critic else []
        before += [self._critic.snapshot()] if self._critic else []
        reports: list[UpdateReport] = []
        critic_reports: list[UpdateReport] = []
        for part in parts:
            objective = Objective(
                [prepared[i] for i in part],
                self._recipe,
                self._parts,
                self._aggregation,
                reference=reference and [reference[i] for i in part],
                start=start and [start[i] for i in part],
                keep=keep and [keep[i] for i in part],
                is_first=not reports,
            )
            reports.append(self._updater.update(objective.sequences, objective, learning_rate=learning_rate))
            if self._critic and targets:
                critic_reports.append(self._critic.update(objective.sequences, [targets[i] for i in part]))
            failed = next((r for r in (reports[-1], *critic_reports[-1:]) if not r.is_finite), None)
            if failed is not None:
                for snapshot in before:
                    snapshot.restore()
                return StepReport(metrics={}, failure=describe_failure(failed))
        measured = update_metrics(reports) | summarise(total_sums(reports))
        if targets:
            measured |= critic_metrics(critic_reports, targets)
        return StepReport(metrics=batch_metrics(batch) | measured | {"learning_rate": learning_rate})


class Objective:
    """The loss of one row, given what was prepared for the minibatch."""

    def __init__(
        self,
        items: Sequence[Prepared],
        recipe: Recipe,
        parts: Parts,
        aggregation: Aggregation,
        *,
        reference: Scores | None,
        start: Scores | None,
        keep: list[NDArray[np.bool_]] | None,
        is_first: bool,
    ) -> None:
        """is_first: the policy is still the one that the step started from."""
        self.sequences: list[TokenSequence] = [item.sequence for item in items]
        self._items = items
        self._lengths = np.array([sequence.num_sampled for sequence in self.sequences])
        self._weights = _spread(aggregation(self._lengths), self._lengths)
        self._proximal = recipe.proximal
        self._parts = parts
        self._reference, self._start, self._keep = reference, start, keep
        self._knows_start = is_first or start is not None

    def __call__(self, row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
        behaviour_S = row.gather([item.behaviour_S for item in self._items])
        current_S = scores.logprobs_S.detach()
        proximal_S, anchor_S = self._policies(row, current_S, behaviour_S)
        loss, sums = policy_gradient_loss(
            RowTerms(
                logprobs_S=scores.logprobs_S,
                proximal_S=proximal_S,
                anchor_S=anchor_S,
                behaviour_S=behaviour_S,
                advantages_S=row.gather([item.advantage_S for item in self._items]),
                weights_S=row.gather(self._weights),
                keep_S=None if self._keep is None else row.gather(self._keep).bool(),
                reference_S=None if self._reference is None else row.gather(self._reference),
                sequences=Sequences.of([int(self._lengths[i]) for i in row.members], row.device),
            ),
            self._parts,
        )
        if self._knows_start:
            same_version_S = row.gather([item.same_version_S for item in self._items]).bool()
            sums |= mismatch(self._at_start(row, current_S), behaviour_S, same_version_S)
        return loss, sums | {"entropy_sum": scores.entropy_S.sum()}

    def _policies(
        self, row: PackedRow, current_S: torch.Tensor, behaviour_S: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log prox, log anchor), both [S] constants."""
        match self._proximal:
            case Proximal.BEHAVIOUR:
                return behaviour_S, current_S
            case Proximal.START:
                start_S = self._at_start(row, current_S)
                return start_S, start_S
            case Proximal.INTERPOLATED:
                lags_S = row.gather([item.lag_S for item in self._items])
                proximal_S = interpolated_proximal(current_S, behaviour_S, lags_S)
                return proximal_S, proximal_S

    def _at_start(self, row: PackedRow, current_S: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the policy that the step started from, or of this update's where none were scored."""
        return current_S if self._start is None else row.gather(self._start)


def _spread(weights_N: NDArray[np.float64], lengths_N: NDArray[np.int64]) -> list[Floats]:
    """One weight a sequence to [S] a sequence."""
    return [
        np.full(length, weight, dtype=np.float32) for weight, length in zip(weights_N, lengths_N, strict=True)
    ]


def _less_divergence(
    rewards: Sequence[NDArray[np.float64]], batch: Batch, reference: Scores, coefficient: float
) -> list[NDArray[np.float64]]:
    """Rewards less coefficient times the sum over tokens of log mu - log ref."""
    divergences = [
        float((behaviour_logprobs(trajectory).astype(np.float64) - reference_S).sum())
        for trajectory, reference_S in zip(batch.trajectories(), reference, strict=True)
    ]
    groups = np.split(np.array(divergences), np.cumsum([len(rewards_G) for rewards_G in rewards])[:-1])
    return [
        rewards_G - coefficient * divergence_G
        for rewards_G, divergence_G in zip(rewards, groups, strict=True)
    ]
