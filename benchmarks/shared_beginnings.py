"""What a training step costs when what siblings share is computed once, over computing every token.

Whole optimiser steps of a GRPO-shaped batch, 8 groups of 16 with prompts of 6 tokens and
answers of 6, on the quickstart's policy (0.8M parameters), float32, one thread: with all
answers of a group different from their first token on, where prompts alone are shared, and
with 4 different ones, which siblings give. In processor time, in turn, in one process.

    OMP_NUM_THREADS=1 python benchmarks/shared_beginnings.py [--rounds 10] [--json FILE]

Names: speedup_16, speedup_4 (by different answers), ms_16, ms_4, every_token_ms (medians).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from harness.report import add_arguments, write

from learner.offline.sft import SftObjective
from learner.training.config import Device, OptimizerConfig, Precision
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.packing import PackedRow, TokenSequence
from learner.training.parallel import open_ranks
from learner.training.updater import Updater
from penstock.quickstart import task
from penstock.quickstart.policy import make_policy

GROUPS, SIBLINGS, PROMPT, ANSWER = 8, 16, 6, 6
LEARNING_RATE = 1e-4


def make_batch(num_answers: int, seed: int) -> list[TokenSequence]:
    """num_answers: different ones of a group."""
    generator = np.random.default_rng(seed)
    mask = np.array([0] * PROMPT + [1] * ANSWER, dtype=np.uint8)
    batch = []
    for _ in range(GROUPS):
        prompt = generator.integers(3, 50, PROMPT)
        firsts = generator.permutation(np.arange(3, 50))[:num_answers]
        answers = [np.append(first, generator.integers(3, 50, ANSWER - 1)) for first in firsts]
        for sibling in range(SIBLINGS):
            ids = np.concatenate([prompt, answers[sibling % num_answers]]).astype(np.int32)
            batch.append(TokenSequence(token_ids=ids, loss_mask=mask))
    return batch


def every_token(row: PackedRow) -> PackedRow:
    """The row as it was laid out."""
    return dataclasses.replace(row, forest=None)


def make_updater(folder: Path, *, shares: bool) -> Updater:
    ranks = open_ranks(Device.CPU, Precision.FLOAT32)
    policy = load_policy(folder)
    if not shares:
        policy._nodes_of = every_token  # type: ignore[method-assign]
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=LEARNING_RATE))
    return Updater(policy, optimizer, ranks, row_tokens=4096, max_grad_norm=1.0)


def step_ms(updater: Updater, batch: Sequence[TokenSequence]) -> float:
    began = time.process_time()
    updater.update(batch, SftObjective(batch), learning_rate=LEARNING_RATE)
    return 1e3 * (time.process_time() - began)


def measure(folder: Path, *, rounds: int) -> dict[str, float]:
    sharing, computing_all = make_updater(folder, shares=True), make_updater(folder, shares=False)
    found: dict[str, list[float]] = {"every_token_ms": [], "ms_16": [], "ms_4": []}
    for number in range(rounds + 2):
        for answers in (16, 4):
            batch = make_batch(answers, seed=number)
            shared, all_of_it = step_ms(sharing, batch), step_ms(computing_all, batch)
            if number >= 2:  # after the warm-up
                found[f"ms_{answers}"].append(shared)
                found["every_token_ms"].append(all_of_it)
    medians = {name: statistics.median(values) for name, values in found.items()}
    speedups = {f"speedup_{n}": medians["every_token_ms"] / medians[f"ms_{n}"] for n in (16, 4)}
    return speedups | medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = make_policy(Path(name) / "policy", seed=0, characters=task.CHARACTERS)
        results = measure(folder, rounds=arguments.rounds)
    write(results, arguments)


if __name__ == "__main__":
    main()
