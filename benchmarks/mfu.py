"""Model FLOPs utilisation of the trainer's step on one GPU: bfloat16, float32 masters, packed rows.

A Qwen3-shaped policy with random weights takes whole optimiser steps (pack, forward, loss,
backward, clip, AdamW) on rows of 4,096 tokens, packed from sequences of 256 to 2,048, under
several settings in turn. MFU counts what the mathematics needs and nothing else: 6 FLOPs a
parameter of a matrix and token, and 6 L^2 a head's width, head and layer for causal attention
over a sequence of L tokens; what is computed twice (activation checkpointing, chunked
logits) counts once. It is divided by the device's dense bfloat16 peak.

    python benchmarks/mfu.py [--size 1.5b] [--json FILE]

Names: mfu, tokens_per_second, peak_memory_gib (of the best setting), and with a setting's
name before them, those of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from harness.report import add_arguments, write
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.algorithms.sft import completion_cross_entropy
from learner.algorithms.sums import Sums
from learner.training.config import Device, OptimizerConfig, Precision
from learner.training.optimizer import make_optimizer
from learner.training.packing import PackedRow, TokenSequence
from learner.training.parallel import Ranks, open_ranks, place
from learner.training.policy import Policy, TokenScores, choose_evaluation
from learner.training.updater import Updater

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16, by what the device's name contains (SXM boards)."""
LENGTHS = (256, 2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    vocabulary: int
    row_tokens: int = 4096
    rows: int = 8
    """Of one step."""


SIZES = {
    "tiny": Size(
        hidden_size=64, num_layers=2, intermediate_size=128, num_heads=4, vocabulary=512, row_tokens=256
    ),
    "0.5b": Size(hidden_size=1024, num_layers=28, intermediate_size=3072, num_heads=16, vocabulary=65_536),
    "1.5b": Size(hidden_size=2048, num_layers=28, intermediate_size=6144, num_heads=16, vocabulary=65_536),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    compiled: bool
    checkpointing: bool


SETTINGS = {
    "compiled": Setting(compiled=True, checkpointing=False),
    "plain": Setting(compiled=False, checkpointing=False),
    "compiled_checkpointing": Setting(compiled=True, checkpointing=True),
    "checkpointing": Setting(compiled=False, checkpointing=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    tokens_per_second: float
    mfu: float
    peak_memory_gib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--row-tokens", type=int, help="tokens of a row; sequences grow with it")
    parser.add_argument("--rows", type=int, default=4, help="of a step, with --row-tokens")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after two that warm up")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not known here")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.row_tokens:
        size = dataclasses.replace(size, row_tokens=arguments.row_tokens, rows=arguments.rows)
    ranks = open_ranks(Device.AUTO, Precision.BFLOAT16)
    peak = 1e12 * (arguments.peak_tflops or known_peak(ranks.device))
    measured = {}
    print(f"{'setting':24s}{'tokens/s':>12s}{'MFU':>8s}{'peak GiB':>10s}", flush=True)
    for name in arguments.settings:
        try:
            measured[name] = measure(size, SETTINGS[name], ranks, steps=arguments.steps, peak=peak)
        except torch.OutOfMemoryError:
            print(f"{name:24s} does not fit", flush=True)
            continue
        finally:
            forget(ranks.device)
        found = measured[name]
        print(
            f"{name:24s}{found.tokens_per_second:12,.0f}{found.mfu:8.1%}{found.peak_memory_gib:10.1f}",
            flush=True,
        )
    ranks.close()
    write(results(measured), arguments)


def known_peak(device: torch.device) -> float:
    """TFLOPS; of a device that is not known, NaN: then there is no MFU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), math.nan)


def results(measured: dict[str, Measured]) -> dict[str, float]:
    """What could be measured; a device without a known peak has no MFU."""
    best = max(measured, key=lambda name: measured[name].tokens_per_second)
    rows = {"": measured[best], **{f"{name}_": one for name, one in measured.items()}}
    found = {
        prefix + field: getattr(one, field)
        for prefix, one in rows.items()
        for field in ("mfu", "tokens_per_second", "peak_memory_gib")
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def measure(size: Size, setting: Setting, ranks: Ranks, *, steps: int, peak: float) -> Measured:
    updater = make_updater(size, setting, ranks)
    batch = make_batch(size)
    objective = Objective(batch)
    seconds = []
    for step in range(steps + 2):
        if step == 2 and ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        report = updater.update(batch, objective, learning_rate=1e-6)
        seconds.append(time.perf_counter() - started)  # the report's loss has come from the device
        assert report.is_finite
    median = statistics.median(seconds[2:])
    on_cuda = ranks.device.type == "cuda"
    return Measured(
        tokens_per_second=sum(sequence.num_tokens for sequence in batch) / median,
        mfu=step_flops(size, [sequence.num_tokens for sequence in batch]) / median / peak,
        peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if on_cuda else math.nan,
    )


def make_updater(size: Size, setting: Setting, ranks: Ranks) -> Updater:
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads // 2,
        head_dim=head_width(size),
        max_position_embeddings=size.row_tokens,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with ranks.device:
        causal_lm = Qwen3ForCausalLM(config).float()
    causal_lm.eval()
    policy = Policy(causal_lm, choose_evaluation(causal_lm))
    causal_lm.train()
    if setting.checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    place(policy, ranks, Precision.BFLOAT16, compiled=setting.compiled)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-6))
    return Updater(policy, optimizer, ranks, row_tokens=size.row_tokens, max_grad_norm=1.0)


def make_batch(size: Size) -> list[TokenSequence]:
    """Sequences that fill about `rows` rows."""
    generator = np.random.default_rng(0)
    scale = size.row_tokens / 4096
    sequences: list[TokenSequence] = []
    left = size.rows * size.row_tokens
    while left > 0:
        length = min(left, int(scale * generator.integers(LENGTHS[0], LENGTHS[1] + 1)))
        token_ids = generator.integers(0, size.vocabulary, length).astype(np.int32)
        sequences.append(TokenSequence(token_ids=token_ids, loss_mask=np.ones(length, dtype=np.uint8)))
        left -= length
    return sequences


class Objective:
    """Cross entropy of all tokens."""

    def __init__(self, batch: Sequence[TokenSequence]) -> None:
        self._num_tokens = sum(sequence.num_sampled for sequence in batch)

    def __call__(self, row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
        return completion_cross_entropy(scores.logprobs_S, num_tokens=self._num_tokens)


def head_width(size: Size) -> int:
    return max(16, size.hidden_size // size.num_heads)


def step_flops(size: Size, lengths: Sequence[int]) -> float:
    heads = size.num_heads * head_width(size)
    attention = (
        2 * size.hidden_size * heads + size.hidden_size * heads
    )  # q and o; k and v with half the heads
    layer = attention + 3 * size.hidden_size * size.intermediate_size
    matrices = size.num_layers * layer + size.hidden_size * size.vocabulary
    scores = size.num_layers * heads * sum(length * length for length in lengths)
    return 6.0 * matrices * sum(lengths) + 6.0 * scores


def forget(device: torch.device) -> None:
    """Gives the memory of the last setting back."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
