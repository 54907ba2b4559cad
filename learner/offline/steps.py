"""The loop of the offline algorithms: batches, learning rates, a bar or log lines."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from learner.offline.config import OfflineConfig
from learner.training.config import OptimizerConfig
from learner.training.optimizer import learning_rate, make_optimizer
from learner.training.parallel import Ranks, place
from learner.training.policy import Policy
from learner.training.updater import Updater, UpdateReport
from penstock.errors import PenstockError

_log = logging.getLogger(__name__)

_NUM_REPORTS = 10
"""Log lines of a whole training when nobody watches a progress bar."""

ItemT = TypeVar("ItemT")
Step = Callable[[list[ItemT], float], tuple[UpdateReport, Mapping[str, float]]]
"""One update on a batch, at a learning rate; returns what is shown beside the loss."""


def make_updater(policy: Policy, ranks: Ranks, config: OfflineConfig, optimizer: OptimizerConfig) -> Updater:
    """Places the policy on its ranks."""
    place(policy, ranks, config.precision)
    return Updater(
        policy,
        make_optimizer(policy, optimizer),
        ranks,
        row_tokens=config.row_tokens,
        rows_per_pass=config.rows_per_pass,
        max_grad_norm=optimizer.max_grad_norm,
    )


def run_steps(
    config: OfflineConfig,
    optimizer: OptimizerConfig,
    items: Sequence[ItemT],
    step: Step[ItemT],
    *,
    batch_size: int,
    name: str,
    quiet: bool,
) -> float:
    """Trains. Returns the mean loss of the last tenth of the steps. Raises PenstockError for one that isn't finite."""
    per_epoch = math.ceil(len(items) / batch_size)
    num_steps = config.num_steps or config.num_epochs * per_epoch
    losses: list[float] = []
    with _reporter(name, num_steps, quiet=quiet) as reporter:
        batches = _batches(items, batch_size=batch_size, seed=config.seed)
        for number, batch in zip(range(num_steps), batches, strict=False):
            rate = learning_rate(optimizer, step=number, num_steps=num_steps)
            report, shown = step(batch, rate)
            if not report.is_finite:
                raise PenstockError(
                    f"step {number}: loss {report.loss}, gradient norm {report.grad_norm}; not finite: lower the "
                    f"learning rate, which is {rate}"
                )
            losses.append(report.loss)
            reporter.step(number + 1, {"loss": report.loss, **shown})
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _batches(items: Sequence[ItemT], *, batch_size: int, seed: int) -> Iterator[list[ItemT]]:
    """Without end: each epoch in an order of its own, by (seed, epoch)."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(items))
        for start in range(0, len(order), batch_size):
            yield [items[index] for index in order[start : start + batch_size]]
        epoch += 1


class _Reporter(Protocol):
    def step(self, done: int, numbers: Mapping[str, float]) -> None: ...


class _LogReporter:
    """A few lines in the log."""

    def __init__(self, num_steps: int, *, quiet: bool) -> None:
        self._num_steps = num_steps
        self._every = max(1, num_steps // _NUM_REPORTS)
        self._quiet = quiet

    def step(self, done: int, numbers: Mapping[str, float]) -> None:
        if not self._quiet and (done % self._every == 0 or done == self._num_steps):
            _log.info("step %d of %d: %s", done, self._num_steps, _written(numbers))


class _BarReporter:
    """A bar on a terminal."""

    def __init__(self, progress: Progress, name: str, num_steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=num_steps, numbers="")

    def step(self, done: int, numbers: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=done, numbers=_written(numbers))


def _written(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items())


@contextmanager
def _reporter(name: str, num_steps: int, *, quiet: bool) -> Iterator[_Reporter]:
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _LogReporter(num_steps, quiet=quiet)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _BarReporter(progress, name, num_steps)
