"""What an algorithm makes of a batch, as the loop sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from learner.algorithms.sums import add_sums
from learner.training.batch import Batch
from learner.training.updater import UpdateReport
from penstock.trajectory import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    metrics: dict[str, float]
    failure: str = ""
    """Why nothing was changed: what was not finite. Empty for a step that was taken."""


class Algorithm(Protocol):
    """Makes the next version of a batch, or says why it could not; then weights are as before.

    Every rank calls it with the same batch.
    """

    def step(self, batch: Batch, version: PolicyVersion, *, learning_rate: float) -> StepReport: ...


def minibatches(num_items: int, *, updates_per_step: int, seed: int, step: int) -> list[list[int]]:
    """Which items each update takes: shuffled by (seed, step), the same on every rank and after a restart."""
    num_parts = min(updates_per_step, num_items)
    if num_parts == 1:
        return [list(range(num_items))]
    order = np.random.default_rng((seed, step)).permutation(num_items)
    return [sorted(part.tolist()) for part in np.array_split(order, num_parts)]


def total_sums(reports: Sequence[UpdateReport]) -> dict[str, float]:
    """The sums of a step's updates, over all of its tokens."""
    sums = add_sums(
        {name: torch.tensor(value, dtype=torch.float64) for name, value in report.sums.items()}
        for report in reports
    )
    return {name: float(value) for name, value in sums.items()}


def update_metrics(reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Mean loss and gradient norm of a step's updates."""
    return {
        "loss": float(np.mean([report.loss for report in reports])),
        "grad_norm": float(np.mean([report.grad_norm for report in reports])),
    }


def describe_failure(report: UpdateReport) -> str:
    return f"loss {report.loss}, gradient norm {report.grad_norm}: not finite"
