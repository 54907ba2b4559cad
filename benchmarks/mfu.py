"""Model FLOPs utilisation of the trainer's step on one GPU: bfloat16, float32 masters, packed rows.

A Qwen3-shaped policy with random weights takes whole optimiser steps (pack, forward, loss,
backward, clip, AdamW) on rows of 4,096 tokens, packed from sequences of 256 to 2,048, under
several settings in turn, with so many rows a pass through the model and so many passes a
step. MFU counts what the mathematics needs and nothing else: 6 FLOPs a
parameter of a matrix and token, and 6 L^2 a head's width, head and layer for causal attention
over a sequence of L tokens; what is computed twice (activation checkpointing, chunked
logits) counts once. It is divided by the device's dense bfloat16 peak.

    python benchmarks/mfu.py [--sizes 1.5b] [--rows-per-pass 5] [--rows 8] [--profile] [--json FILE]

Names: mfu, tokens_per_second, peak_memory_gib (of the best case), and with a case's
name before them, those of each: size, setting, rows a pass, rows a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from harness.gpu_profile import print_profile
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
    arguments = parse()
    ranks = open_ranks(Device.AUTO, Precision.BFLOAT16)
    peak = 1e12 * (arguments.peak_tflops or known_peak(ranks.device))
    print(
        f"{'size':6s}{'setting':24s}{'rows':>5s}{'/pass':>6s}{'tokens/s':>11s}{'MFU':>8s}{'GiB':>7s}",
        flush=True,
    )
    measured: dict[str, Measured] = {}
    for size, setting in itertools.product(arguments.sizes, arguments.settings):
        measured |= measure_all(size, setting, arguments, ranks, peak)
        forget(ranks.device)
    ranks.close()
    write(results(measured), arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1.5b"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument(
        "--rows-per-pass", nargs="+", type=int, default=[5], help="at most, that are evaluated together"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[8], help="of a step")
    parser.add_argument("--row-tokens", type=int, help="tokens of a row; sequences grow with it")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after two that warm up")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not known here")
    parser.add_argument(
        "--profile", action="store_true", help="where the time of each setting's first case goes"
    )
    return parser.parse_args()


def measure_all(
    size_name: str, setting_name: str, arguments: argparse.Namespace, ranks: Ranks, peak: float
) -> dict[str, Measured]:
    """Every number of rows under one setting, with one policy. A case that fails ends them, and says why."""
    size = SIZES[size_name]
    if arguments.row_tokens:
        size = dataclasses.replace(size, row_tokens=arguments.row_tokens)
    measured: dict[str, Measured] = {}
    try:
        policy = make_policy(size, SETTINGS[setting_name], ranks)
        optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-6))
        for rows, per_pass in itertools.product(arguments.rows, arguments.rows_per_pass):
            print(f"{size_name:6s}{setting_name:24s}{rows:5d}{per_pass:6d}", end="", flush=True)
            updater = Updater(
                policy,
                optimizer,
                ranks,
                row_tokens=size.row_tokens,
                rows_per_pass=per_pass,
                max_grad_norm=1.0,
            )
            profiled = arguments.profile and not measured
            found = measure(updater, size, rows, steps=arguments.steps, peak=peak, profiled=profiled)
            measured[f"{size_name}_{setting_name}_{rows}_rows_{per_pass}_a_pass"] = found
    except torch.OutOfMemoryError:
        print("  does not fit", flush=True)
    except Exception as error:  # noqa: BLE001
        print(f"  failed: {type(error).__name__}: {error}"[:600], flush=True)
    return measured


def known_peak(device: torch.device) -> float:
    """TFLOPS; of a device that is not known, NaN: then there is no MFU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), math.nan)


def results(measured: dict[str, Measured]) -> dict[str, float]:
    """What could be measured; a device without a known peak has no MFU."""
    if not measured:
        raise SystemExit("no case could be measured")
    best = max(measured, key=lambda name: (measured[name].mfu, measured[name].tokens_per_second))
    rows = {"": measured[best], **{f"{name}_": one for name, one in measured.items()}}
    found = {
        prefix + field: getattr(one, field)
        for prefix, one in rows.items()
        for field in ("mfu", "tokens_per_second", "peak_memory_gib")
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def measure(updater: Updater, size: Size, rows: int, *, steps: int, peak: float, profiled: bool) -> Measured:
    """The median of whole steps. Each ends when its loss is known, and so includes the optimiser of the one before."""
    batch = make_batch(size, rows)
    objective = Objective(batch)
    on_cuda = updater.ranks.device.type == "cuda"
    seconds = []
    for step in range(steps + 2):
        if step == 2 and on_cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        report = updater.update(batch, objective, learning_rate=1e-6)
        seconds.append(time.perf_counter() - started)
        if not report.is_finite:
            raise RuntimeError(f"step {step}: loss {report.loss}, gradient norm {report.grad_norm}")
    lengths = [sequence.num_tokens for sequence in batch]
    median = statistics.median(seconds[2:])
    found = Measured(
        tokens_per_second=sum(lengths) / median,
        mfu=sum(step_flops(size, lengths).values()) / median / peak,
        peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if on_cuda else math.nan,
    )
    print(f"{found.tokens_per_second:11,.0f}{found.mfu:8.1%}{found.peak_memory_gib:7.1f}", flush=True)
    if profiled:
        for part, flops in step_flops(size, lengths).items():
            print(f"  {1e3 * flops / peak:8.1f} ms  at the peak: {part}")
        print_profile(lambda: updater.update(batch, objective, learning_rate=1e-6))
    return found


def make_policy(size: Size, setting: Setting, ranks: Ranks) -> Policy:
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
    return policy


def make_batch(size: Size, rows: int) -> list[TokenSequence]:
    """Sequences that fill about so many rows."""
    generator = np.random.default_rng(0)
    scale = size.row_tokens / 4096
    sequences: list[TokenSequence] = []
    left = rows * size.row_tokens
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


def step_flops(size: Size, lengths: Sequence[int]) -> dict[str, float]:
    """What a step needs, by part."""
    heads = size.num_heads * head_width(size)
    # q and o; k and v with half the heads
    attention = 2 * size.hidden_size * heads + size.hidden_size * heads
    layer = attention + 3 * size.hidden_size * size.intermediate_size
    scores = size.num_layers * heads * sum(length * length for length in lengths)
    return {
        "matrices of the blocks": 6.0 * size.num_layers * layer * sum(lengths),
        "logits": 6.0 * size.hidden_size * size.vocabulary * sum(lengths),
        "attention": 6.0 * scores,
    }


def forget(device: torch.device) -> None:
    """Gives the memory of the last setting back."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
