"""GRPO on a batch of groups: host-side preparation, then one or more updates.

With one update a step the proximal policy is the learner policy itself. With more, the
batch is scored once before the first update, split into minibatches of whole
trajectories, and each is one update against those scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from learner.algorithms.grpo import group_advantages, grpo_loss, mismatch, summarise
from learner.algorithms.sums import Sums, add_sums
from learner.training.batch import Batch, batch_metrics
from learner.training.config import GrpoConfig
from learner.training.packing import PackedRow, TokenSequence
from learner.training.policy import TokenScores
from learner.training.updater import Snapshot, Updater, UpdateReport
from penstock.trajectory import PolicyVersion, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    metrics: dict[str, float]
    failure: str = ""
    """Why nothing was changed: what was not finite. Empty for a step that was taken."""


class Grpo:
    """The algorithm as the loop sees it: `step` makes the next version of a batch, or says why not."""

    def __init__(self, updater: Updater, config: GrpoConfig, *, seed: int) -> None:
        self._updater = updater
        self._config = config
        self._seed = seed

    def step(self, batch: Batch, version: PolicyVersion, *, learning_rate: float) -> StepReport:
        """Trains on a batch. Every rank calls it with the same batch. Weights stay as they were on failure."""
        prepared = _prepare(batch, version, scale_by_std=self._config.scale_by_std)
        parts = self._minibatches(len(prepared), batch.step)
        several = len(parts) > 1
        before = Snapshot(self._updater) if several else None
        proximal = self._updater.score([item.sequence for item in prepared]) if several else None
        reports = []
        for part in parts:
            objective = _Objective(
                [prepared[i] for i in part], self._config, proximal and [proximal[i] for i in part]
            )
            reports.append(self._updater.update(objective.sequences, objective, learning_rate=learning_rate))
            if not reports[-1].is_finite:
                if before is not None:
                    before.restore()
                return StepReport(metrics={}, failure=_describe(reports[-1]))
        return StepReport(metrics=batch_metrics(batch) | _metrics(reports) | {"learning_rate": learning_rate})

    def _minibatches(self, num_trajectories: int, step: int) -> list[list[int]]:
        """Shuffled by (seed, step): the same on every rank, and after a restart."""
        num_parts = min(self._config.updates_per_step, num_trajectories)
        if num_parts == 1:
            return [list(range(num_trajectories))]
        order = np.random.default_rng((self._seed, step)).permutation(num_trajectories)
        return [sorted(part.tolist()) for part in np.array_split(order, num_parts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    sequence: TokenSequence
    behaviour_S: NDArray[np.float32]
    advantage_S: NDArray[np.float32]
    same_version_S: NDArray[np.bool_]


def _prepare(batch: Batch, version: PolicyVersion, *, scale_by_std: bool) -> list[_Prepared]:
    prepared = []
    for group in batch.groups:
        rewards_G = torch.tensor([t.reward.value for t in group.trajectories], dtype=torch.float64)
        advantages_G = group_advantages(rewards_G, scale_by_std=scale_by_std).tolist()
        for trajectory, advantage in zip(group.trajectories, advantages_G, strict=True):
            prepared.append(_prepare_one(trajectory, advantage, version))
    return prepared


def _prepare_one(trajectory: Trajectory, advantage: float, version: PolicyVersion) -> _Prepared:
    sequence = TokenSequence(token_ids=trajectory.token_ids, loss_mask=trajectory.loss_mask)
    same_version_T = np.zeros(sequence.num_tokens, dtype=bool)
    same_version_T[np.flatnonzero(trajectory.loss_mask)] = np.repeat(
        [span.version == version for span in trajectory.versions],
        [span.num_tokens for span in trajectory.versions],
    )
    with np.errstate(over="ignore"):  # an infinite advantage is found by the step's check
        advantage_S = np.full(sequence.num_sampled, advantage, dtype=np.float32)
    return _Prepared(
        sequence=sequence,
        behaviour_S=sequence.sampled(trajectory.logprobs).astype(np.float32),
        advantage_S=advantage_S,
        same_version_S=sequence.sampled(same_version_T).astype(bool),
    )


class _Objective:
    """GRPO's loss of one row, given what was prepared for the minibatch."""

    def __init__(
        self, items: list[_Prepared], config: GrpoConfig, proximal: list[NDArray[np.float32]] | None
    ) -> None:
        self.sequences = [item.sequence for item in items]
        self._behaviour = [item.behaviour_S for item in items]
        self._advantages = [item.advantage_S for item in items]
        self._same_version = [item.same_version_S for item in items]
        self._proximal = proximal
        self._config = config
        self._num_tokens = sum(sequence.num_sampled for sequence in self.sequences)

    def __call__(self, row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
        current_S = scores.logprobs_S.detach()
        proximal_S = current_S if self._proximal is None else row.gather(self._proximal)
        behaviour_S = row.gather(self._behaviour)
        loss, sums = grpo_loss(
            scores.logprobs_S,
            proximal_S,
            behaviour_S,
            row.gather(self._advantages),
            clip_low=self._config.clip_low,
            clip_high=self._config.clip_high,
            importance_cap=self._config.importance_cap,
            num_tokens=self._num_tokens,
        )
        sums |= mismatch(proximal_S, behaviour_S, row.gather(self._same_version).bool())
        return loss, sums | {"entropy_sum": scores.entropy_S.sum()}


def _metrics(reports: list[UpdateReport]) -> dict[str, float]:
    """Of a step: the mean loss and gradient norm of its updates, and ratios over all of its tokens."""
    sums = add_sums(
        {name: torch.tensor(value, dtype=torch.float64) for name, value in report.sums.items()}
        for report in reports
    )
    return {
        "loss": float(np.mean([report.loss for report in reports])),
        "grad_norm": float(np.mean([report.grad_norm for report in reports])),
        **summarise({name: float(value) for name, value in sums.items()}),
    }


def _describe(report: UpdateReport) -> str:
    return f"loss {report.loss}, gradient norm {report.grad_norm}: not finite"
