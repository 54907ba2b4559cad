"""What lossless deltas save, and how fast they are made and applied, on real optimiser steps.

A policy of 23M parameters (random weights, tied embeddings, fp32 masters, published in bf16) takes
policy-gradient steps with AdamW at a learning rate of 1e-6: completions with advantages of both signs,
whose tokens are drawn uniformly, which is what an untrained policy would sample. Every step's version is
told as a delta on the one before it, by one thread. The peer is what one would do without a codec of
one's own: XOR of the two versions, compressed by zstd at level 1.

    ratio_first, ratio_steady   bytes of bf16 weights over bytes of the delta: of step 1, of the last ten
    encode_gb_per_s             gigabytes of weights a second of a thread's processor time
    decode_gb_per_s             the same, decoding and applying in place
    encode_wall_gb_per_s, decode_wall_gb_per_s    the same by the clock, on whatever else the machine does
    ratio_xor_zstd              the peer's ratio_steady
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from harness.report import add_arguments, write
from numpy.typing import NDArray
from transformers import Qwen3Config, Qwen3ForCausalLM

from penstock.weights.delta import apply_all, encode_version
from penstock.weights.manifest import HostTensor, TensorEntry, pack, plan_layout

LEARNING_RATE = 1e-6
NUM_SEQUENCES = 8
NUM_TOKENS = 64
NUM_STEADY = 10

Version = NDArray[np.uint8]


def make_policy() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )


def train(num_steps: int) -> Iterator[tuple[tuple[TensorEntry, ...], Version]]:
    """The published version before the first step, and after each."""
    policy = make_policy()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.01
    )
    yield publish(policy)
    for _ in range(num_steps):
        tokens = torch.randint(policy.config.vocab_size, (NUM_SEQUENCES, NUM_TOKENS))
        advantages = torch.randn(NUM_SEQUENCES, 1)
        advantages -= advantages.mean()
        logits = policy(tokens).logits[:, :-1]
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        loss = -(advantages * chosen).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        yield publish(policy)


def publish(policy: Qwen3ForCausalLM) -> tuple[tuple[TensorEntry, ...], Version]:
    tensors = []
    for name, parameter in policy.named_parameters():
        half = parameter.detach().to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy()
        tensors.append(HostTensor(name=name, dtype="BF16", shape=tuple(parameter.shape), data=half))
    entries, num_bytes = plan_layout(tensors)
    buffer = np.empty(num_bytes, dtype=np.uint8)
    pack(buffer, entries, tensors)
    return entries, buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    processor: float
    """Of this one thread: what else the machine does is not counted."""
    wall: float


def timed(works: Iterable[Callable[[], object]]) -> Seconds:
    """All of them together; what makes each of them is not counted."""
    processor = wall = 0.0
    for work in works:
        began = time.thread_time(), time.perf_counter()
        work()
        processor += time.thread_time() - began[0]
        wall += time.perf_counter() - began[1]
    return Seconds(processor=processor, wall=wall)


def apply(delta: Version, version: Version) -> None:
    apply_all([delta], version, num_threads=1)


def xor_zstd(old: Version, new: Version) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress((old ^ new).data)


def speeds(
    entries: tuple[TensorEntry, ...], steady: list[Version], deltas: list[Version]
) -> tuple[Seconds, Seconds]:
    """What encoding and decoding all steady steps take; every result is compared."""
    pairs = list(itertools.pairwise(steady))
    encode = timed(functools.partial(encode_version, entries, old, new) for old, new in pairs)
    made = [old.copy() for old in steady[:-1]]
    decode = timed(
        functools.partial(apply, delta, version) for delta, version in zip(deltas, made, strict=True)
    )
    assert all(np.array_equal(version, new) for version, new in zip(made, steady[1:], strict=True))
    return encode, decode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    add_arguments(parser)
    arguments = parser.parse_args()

    first_ratio, steady = 0.0, []
    for step, (entries, version) in enumerate(train(arguments.num_steps)):
        if step == 1:
            first_ratio = version.size / len(encode_version(entries, steady[0], version))
        steady = [*steady, version][-NUM_STEADY - 1 :]
    deltas = [
        np.frombuffer(encode_version(entries, old, new), dtype=np.uint8)
        for old, new in itertools.pairwise(steady)
    ]
    ratios = [version.size / delta.size for version, delta in zip(steady[1:], deltas, strict=True)]
    peers = [new.size / len(xor_zstd(old, new)) for old, new in itertools.pairwise(steady)]
    changed = [
        np.count_nonzero(old.view(np.uint16) != new.view(np.uint16)) / (new.size / 2)
        for old, new in itertools.pairwise(steady)
    ]
    measured = [speeds(entries, steady, deltas) for _ in range(arguments.repeats)]
    encode, decode = zip(*measured, strict=True)
    total = sum(version.size for version in steady[1:]) / 1e9
    results = {
        "ratio_steady": statistics.median(ratios),
        "ratio_first": first_ratio,
        "encode_gb_per_s": total / statistics.median(each.processor for each in encode),
        "decode_gb_per_s": total / statistics.median(each.processor for each in decode),
        "encode_wall_gb_per_s": total / statistics.median(each.wall for each in encode),
        "decode_wall_gb_per_s": total / statistics.median(each.wall for each in decode),
        "ratio_xor_zstd": statistics.median(peers),
        "ratio_over_xor_zstd": statistics.median(
            ours / peer for ours, peer in zip(ratios, peers, strict=True)
        ),
        "changed_share_steady": statistics.median(changed),
    }
    write(results, arguments)


if __name__ == "__main__":
    main()
