"""`penstock train sft RUN.toml`: the offline algorithms, which need no actors.

The same policy, rows, ranks and optimiser as a run's trainer; only the objective and
where sequences come from differ.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from learner.algorithms.sft import completion_cross_entropy
from learner.algorithms.sums import Sums
from learner.training.config import Device, OptimizerConfig, Precision
from learner.training.examples import load_tokenizer, read_examples
from learner.training.folder import check_output_folder, write_policy_folder
from learner.training.launch import launch_command
from learner.training.model import load_policy
from learner.training.optimizer import learning_rate, make_optimizer
from learner.training.packing import PackedRow, TokenSequence
from learner.training.parallel import Ranks, open_ranks, place, whole
from learner.training.policy import TokenScores
from learner.training.publish import published_tensors
from learner.training.updater import Updater
from penstock import config as configuration
from penstock import log
from penstock.errors import ConfigError, PenstockError

_log = logging.getLogger(__name__)

_NUM_REPORTS = 10
"""Log lines of a whole training when nobody watches a progress bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig:
    policy: Path
    """A Hugging Face folder: config.json, tokeniser, safetensors."""
    data: Path
    """JSONL: {"prompt": ..., "completion": ...} a line. Prompts are not learned from."""
    out: Path
    """Where the trained policy is written, as a Hugging Face folder."""
    num_epochs: int = 1
    """Passes over the data."""
    num_steps: int = 0
    """Optimiser steps; 0 takes `num_epochs` passes, anything else ends or goes on regardless of them."""
    batch_sequences: int = 64
    """Examples of one step."""
    row_tokens: int = 4096
    """Token budget of a packed row. A longer example has a row of its own."""
    seed: int = 0
    num_ranks: int = 1
    """Processes on this host; FSDP2 shards the policy over them."""
    device: Device = Device.AUTO
    precision: Precision = Precision.FLOAT32
    activation_checkpointing: bool = False
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))

    def __post_init__(self) -> None:
        for name, least in (("num_epochs", 1), ("num_steps", 0), ("batch_sequences", 1), ("num_ranks", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.row_tokens < 16:
            raise ConfigError(f"row_tokens is {self.row_tokens}; expected at least 16")


def main(argv: Sequence[str]) -> int:
    """`penstock train sft [RUN.toml] [--flag value ...]`. Several ranks replace this process by their agent."""
    if not argv or argv[0] != "sft":
        got = argv[0] if argv else "nothing"
        raise ConfigError(f"penstock train: got {got}; expected `penstock train sft RUN.toml`")
    config = configuration.load(
        SftConfig, argv[1:], prog="penstock train sft", description="Supervised fine-tuning on completions."
    )
    if config.num_ranks > 1 and "RANK" not in os.environ:
        command = launch_command(module="learner.offline", arguments=argv, num_ranks=config.num_ranks)
        os.execv(command[0], command)  # noqa: S606
    log.configure()
    with ExitStack() as stack:
        ranks = open_ranks(config.device, config.precision)
        stack.callback(ranks.close)
        final_loss = train_sft(config, ranks)
    if ranks.is_first:
        Console().print(f"final loss {final_loss:.4f}; policy written to {config.out}", highlight=False)
    return 0


def train_sft(config: SftConfig, ranks: Ranks) -> float:
    """Trains and writes the policy. Returns the mean loss of the last tenth of the steps. Raises PenstockError."""
    check_output_folder(config.out)
    torch.manual_seed(config.seed)
    policy = load_policy(config.policy, activation_checkpointing=config.activation_checkpointing)
    context = getattr(policy.causal_lm.config, "max_position_embeddings", None) or sys.maxsize
    examples = read_examples(config.data, load_tokenizer(config.policy), max_tokens=context)
    place(policy, ranks, config.precision)
    updater = Updater(
        policy,
        make_optimizer(policy, config.optimizer),
        ranks,
        row_tokens=config.row_tokens,
        max_grad_norm=config.optimizer.max_grad_norm,
    )
    losses = _run_steps(config, updater, examples)
    tensors = {name: whole(tensor) for name, tensor in published_tensors(policy)}
    if ranks.is_first:
        write_policy_folder(config.out, tensors, source=config.policy, precision=config.precision)
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _run_steps(config: SftConfig, updater: Updater, examples: Sequence[TokenSequence]) -> list[float]:
    per_epoch = math.ceil(len(examples) / config.batch_sequences)
    num_steps = config.num_steps or config.num_epochs * per_epoch
    losses: list[float] = []
    with _reporter(num_steps, quiet=not updater.ranks.is_first) as reporter:
        for step, batch in zip(range(num_steps), _batches(config, examples), strict=False):
            rate = learning_rate(config.optimizer, step=step, num_steps=num_steps)
            report = updater.update(batch, SftObjective(batch), learning_rate=rate)
            if not report.is_finite:
                raise PenstockError(
                    f"step {step}: loss {report.loss}, gradient norm {report.grad_norm}; not finite: lower the "
                    f"learning rate, which is {rate}"
                )
            losses.append(report.loss)
            reporter.step(step + 1, report.loss)
    return losses


def _batches(config: SftConfig, examples: Sequence[TokenSequence]) -> Iterator[list[TokenSequence]]:
    """Without end: each epoch in an order of its own, by (seed, epoch)."""
    epoch = 0
    while True:
        order = np.random.default_rng((config.seed, epoch)).permutation(len(examples))
        for start in range(0, len(order), config.batch_sequences):
            yield [examples[index] for index in order[start : start + config.batch_sequences]]
        epoch += 1


class SftObjective:
    """Cross entropy of one row's completions, normalised over the whole batch."""

    def __init__(self, batch: Sequence[TokenSequence]) -> None:
        self._num_tokens = sum(sequence.num_sampled for sequence in batch)

    def __call__(self, row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
        return completion_cross_entropy(scores.logprobs_S, num_tokens=self._num_tokens)


class _Reporter(Protocol):
    def step(self, done: int, loss: float) -> None: ...


class _LogReporter:
    """A few lines in the log."""

    def __init__(self, num_steps: int, *, quiet: bool) -> None:
        self._num_steps = num_steps
        self._every = max(1, num_steps // _NUM_REPORTS)
        self._quiet = quiet

    def step(self, done: int, loss: float) -> None:
        if not self._quiet and (done % self._every == 0 or done == self._num_steps):
            _log.info("step %d of %d: loss %.4f", done, self._num_steps, loss)


class _BarReporter:
    """A bar on a terminal."""

    def __init__(self, progress: Progress, num_steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task("sft", total=num_steps, loss=math.nan)

    def step(self, done: int, loss: float) -> None:
        self._progress.update(self._task, completed=done, loss=loss)


@contextmanager
def _reporter(num_steps: int, *, quiet: bool) -> Iterator[_Reporter]:
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _LogReporter(num_steps, quiet=quiet)
        return
    loss = TextColumn("loss {task.fields[loss]:.4f}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        loss,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _BarReporter(progress, num_steps)


if __name__ == "__main__":
    from penstock.cli import run

    sys.exit(run("learner.offline:main", sys.argv[1:]))
