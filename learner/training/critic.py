"""The critic of PPO: a second model with an optimiser of its own, trained beside the policy.

It starts from the run's policy with a head that says 0, and shares nothing with it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from learner.algorithms.gae import Floats, token_advantages, whitened
from learner.algorithms.sums import Sums
from learner.algorithms.values import explained_share, value_loss
from learner.training.checkpoint import Checkpoint, Checkpoints
from learner.training.packing import PackedRow, TokenSequence
from learner.training.policy import TokenScores
from learner.training.retention import Retention
from learner.training.updater import Snapshot, Updater, UpdateReport


class Critic:
    """Estimates the return before each sampled token. Every rank calls the same methods."""

    def __init__(self, updater: Updater, *, learning_rate: float, gamma: float, lam: float) -> None:
        """updater: of a ScalarModel."""
        self.updater = updater
        self._learning_rate = learning_rate
        self._gamma = gamma
        self._lam = lam

    def advantages(
        self, sequences: Sequence[TokenSequence], rewards: Sequence[Floats]
    ) -> tuple[list[Floats], list[NDArray[np.float32]]]:
        """(advantages, targets) of each sequence's sampled tokens; advantages are whitened over the step.

        rewards: [S] a sequence, what follows each token.
        """
        estimates = zip(rewards, self.updater.score(sequences), strict=True)
        found = [
            token_advantages(rewards_S, values_S.astype(np.float64), gamma=self._gamma, lam=self._lam)
            for rewards_S, values_S in estimates
        ]
        targets = [targets_S.astype(np.float32) for _, targets_S in found]
        return whitened([advantages_S for advantages_S, _ in found]), targets

    def update(
        self, sequences: Sequence[TokenSequence], targets: Sequence[NDArray[np.float32]]
    ) -> UpdateReport:
        num_tokens = sum(sequence.num_sampled for sequence in sequences)

        def objective(row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
            return value_loss(scores.logprobs_S, row.gather(targets), num_tokens=num_tokens)

        return self.updater.update(sequences, objective, learning_rate=self._learning_rate)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.updater)


def critic_metrics(
    reports: Sequence[UpdateReport], targets: Sequence[NDArray[np.float32]]
) -> dict[str, float]:
    """Of a step."""
    flat = np.concatenate(targets).astype(np.float64)
    error = sum(report.sums["value_error_square_sum"] for report in reports) / len(flat)
    return {
        "value_loss": float(np.mean([report.loss for report in reports])),
        "value_grad_norm": float(np.mean([report.grad_norm for report in reports])),
        "value_explained": explained_share(error, float(flat.var())),
    }


class CheckpointsWithCritic(Checkpoints):
    """The critic's checkpoint is complete before the policy's of the same step, which is what counts."""

    def __init__(self, folder: Path, updater: Updater, critic: Critic, *, retention: Retention) -> None:
        super().__init__(folder, updater, retention=retention)
        # One more than the policy's newest, so that each of those has its critic even if a write is cut short.
        self._critic = Checkpoints(folder.with_name("critic"), critic.updater, keep=retention.keep + 1)

    def begin(
        self, step: int, metrics: Mapping[str, float] | None = None, *, epoch: int = 0, weights: str = ""
    ) -> None:
        self._critic.begin(step)
        super().begin(step, metrics, epoch=epoch, weights=weights)

    def is_written(self) -> bool:
        critic, policy = self._critic.is_written(), super().is_written()
        return critic and policy

    def finish(self) -> Checkpoint:
        self._critic.finish()
        return super().finish()

    def delete_unfinished(self) -> None:
        super().delete_unfinished()
        self._critic.delete_unfinished()

    def resume(self) -> int:
        step = super().resume()
        if step:
            self._critic.load(step)
        return step
