"""How many tokens a second the trainer trains on, against TRL's, and what its memory peak is.

Both take whole optimiser steps (collate, forward, loss, backward, clip, AdamW) of
supervised fine-tuning on the same sequences, lengths uniform in 16 to 512, from the same
folder, in float32, on one thread, in turn. TRL runs in a process of its own, where nothing of
ours is loaded; it pads a batch of 8 (its default) and accumulates to the same step; its gradient
checkpointing, on by default, is off here, which makes it faster. Only real tokens count.

The memory peak is that of one step on one row of 4,096 tokens under a vocabulary of
32,768, beyond what the process held before the step, each in a process of its own: with
log-probabilities in chunks, as the trainer computes them, and from full logits.

    OMP_NUM_THREADS=1 python benchmarks/train_throughput.py [--json FILE]

Names: tokens_ratio_0_8m, tokens_ratio_20m (medians of the rounds), tokens_per_second_*,
trl_tokens_per_second_*, peak_memory_ratio, peak_memory_mib, full_logits_mib.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from harness.report import add_arguments, write

from learner.offline.sft import SftObjective
from learner.training.config import Device, OptimizerConfig, Precision
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.packing import TokenSequence
from learner.training.parallel import open_ranks
from learner.training.policy import Evaluation, RowForm
from learner.training.updater import Updater
from penstock.quickstart.policy import make_policy

LENGTHS = (16, 512)
MEASURED_STEPS = 2
TRL_BATCH = 8
LEARNING_RATE = 1e-4
MEMORY_ROW = 4096
MEMORY_VOCABULARY = 32_768

Batches = Sequence[Sequence[TokenSequence]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    vocabulary: int
    hidden_size: int
    num_layers: int
    batch_sequences: int
    """Sequences of one optimiser step."""


SIZES = {
    "0_8m": Size(vocabulary=64, hidden_size=128, num_layers=3, batch_sequences=32),
    "20m": Size(vocabulary=4096, hidden_size=384, num_layers=8, batch_sequences=16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side and size")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, float] = {}
        for name in arguments.sizes:
            results |= throughput(name, Path(folder) / name, rounds=arguments.rounds)
        results |= peak_memory(Path(folder) / "wide")
    write(results, arguments)


def write_policy(folder: Path, *, vocabulary: int, hidden_size: int, num_layers: int) -> Path:
    characters = "".join(chr(0x4E00 + index) for index in range(vocabulary - 3))
    return make_policy(
        folder,
        seed=0,
        characters=characters,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=4 * hidden_size,
        max_context=MEMORY_ROW,
    )


def make_sequences(lengths: Sequence[int], vocabulary: int) -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    return [
        TokenSequence(
            token_ids=generator.integers(3, vocabulary, length).astype(np.int32),
            loss_mask=np.ones(length, dtype=np.uint8),
        )
        for length in lengths
    ]


def throughput(name: str, folder: Path, *, rounds: int) -> dict[str, float]:
    size = SIZES[name]
    write_policy(folder, vocabulary=size.vocabulary, hidden_size=size.hidden_size, num_layers=size.num_layers)
    lengths = np.random.default_rng(1).integers(
        LENGTHS[0], LENGTHS[1] + 1, (1 + MEASURED_STEPS) * size.batch_sequences
    )
    sequences = make_sequences(lengths.tolist(), size.vocabulary)
    batches = [
        sequences[start : start + size.batch_sequences]
        for start in range(0, len(sequences), size.batch_sequences)
    ]
    updater = make_updater(folder)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(our_rate(updater, batches))
        theirs.append(elsewhere(trl_rate, folder, batches))
    return {
        f"tokens_ratio_{name}": statistics.median(ours) / statistics.median(theirs),
        f"tokens_per_second_{name}": statistics.median(ours),
        f"trl_tokens_per_second_{name}": statistics.median(theirs),
    }


def make_updater(folder: Path) -> Updater:
    ranks = open_ranks(Device.CPU, Precision.FLOAT32)
    policy = load_policy(folder)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=LEARNING_RATE))
    return Updater(policy, optimizer, ranks, row_tokens=MEMORY_ROW, max_grad_norm=1.0)


def our_rate(updater: Updater, batches: Batches) -> float:
    """Tokens a second over all steps but the first."""
    ends = []
    for batch in batches:
        updater.update(batch, SftObjective(batch), learning_rate=LEARNING_RATE)
        ends.append(time.perf_counter())
    return measured_tokens(batches) / (ends[-1] - ends[0])


def trl_rate(folder: Path, batches: Batches) -> float:
    """The same of TRL's trainer, in the same order of sequences."""
    torch.set_num_threads(1)
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=TRL_BATCH,
            gradient_accumulation_steps=len(batches[0]) // TRL_BATCH,
            gradient_checkpointing=False,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            max_length=None,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            train_sampling_strategy="sequential",
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=settings,
            train_dataset=Dataset.from_dict(
                {"input_ids": [s.token_ids.tolist() for b in batches for s in b]}
            ),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[Clock()],
        )
        trainer.train()
    assert len(ends) == len(batches)
    return measured_tokens(batches) / (ends[-1] - ends[0])


def measured_tokens(batches: Batches) -> int:
    """Those of all batches but the first, which warms up."""
    return sum(sequence.num_tokens for batch in batches[1:] for sequence in batch)


def peak_memory(folder: Path) -> dict[str, float]:
    write_policy(folder, vocabulary=MEMORY_VOCABULARY, hidden_size=128, num_layers=3)
    peaks = {chunked: elsewhere(step_peak_mib, folder, chunked) for chunked in (True, False)}
    return {
        "peak_memory_ratio": peaks[True] / peaks[False],
        "peak_memory_mib": peaks[True],
        "full_logits_mib": peaks[False],
    }


def elsewhere(measure: Callable[..., float], *arguments: Any) -> float:
    """Calls it in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def step_peak_mib(folder: Path, chunked: bool) -> float:
    """How far one step's peak lies above what was there before it."""
    torch.set_num_threads(1)
    updater = make_updater(folder)
    updater.policy.evaluation = Evaluation(form=RowForm.PACKED, split_head=chunked)
    batch = make_sequences([512] * (MEMORY_ROW // 512), MEMORY_VOCABULARY)
    before = psutil.Process(os.getpid()).memory_info().rss
    updater.update(batch, SftObjective(batch), learning_rate=LEARNING_RATE)
    return (peak_bytes() - before) / 2**20


def peak_bytes() -> int:
    """The most that this process has held; unlike getrusage's figure it does not include its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kib * 1024


if __name__ == "__main__":
    main()
