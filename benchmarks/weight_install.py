"""What an install costs a vLLM engine that is generating, against vLLM's own three-phase update.

A policy of 210M parameters in bfloat16, with random weights, decodes eight sequences on
this machine's CPU. The trainer's side has published versions in shared memory; ours takes
each from there: copies and digests it off the hot path, then switches between two decode
steps. The peer is vLLM's start, update and finish, on an engine as vLLM makes it (with
packed weights), fed from the same shared memory.

    OMP_NUM_THREADS=1 python benchmarks/weight_install.py [--json FILE]

Names:
    pause_over_decode_step      for how long no step could run, by the time of one step
    worker_ms                   of it, in the worker
    speedup_over_three_phase    the peer's pause by ours
    throughput_ratio            tokens/s with an install every second by tokens/s without
    prepare_ms                  from the announcement to where the switch begins
    decode_over_packed          tokens/s of our engine, whose weights are not packed, by the peer's
    throughput_ratio_low, throughput_ratio_high  the quartiles of its rounds
Medians; the ratios of throughput are of windows that take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from harness.report import add_arguments, write
from transformers import AutoModelForCausalLM, Qwen3Config

from actors.engines.base import GenerationRequest
from actors.engines.names import require_engine
from actors.engines.vllm import VllmEngine
from penstock.errors import ConfigError
from penstock.trajectory import PolicyVersion, Sampling
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import HostTensor, Manifest
from penstock.weights.segment import SegmentRing

NUM_SEQUENCES = 8
MAX_CONTEXT = 512
PROMPT = np.arange(10, 26, dtype=np.int32)
NUM_VERSIONS = 3
"""More than the engine's segments, so that each install has to be prepared."""
WARM_UP_SECONDS = 3.0
FIRST_TOKENS_SECONDS = 300.0


def policy_config() -> Qwen3Config:
    """209.8M parameters."""
    return Qwen3Config(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=14,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=None,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )


def publish(ring: SegmentRing, config: Qwen3Config) -> list[Manifest]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    manifests = []
    for step in range(NUM_VERSIONS):
        tensors = []
        for name, parameter in model.named_parameters():
            # Every element changes, by about one part in a hundred.
            data = (parameter.detach() * (1 + step / 100)).view(torch.uint8).reshape(-1).numpy()
            tensors.append(HostTensor(name=name, dtype="BF16", shape=tuple(parameter.shape), data=data))
        manifests.append(ring.write(PolicyVersion(1, step), tensors))
    return manifests


def newer_versions(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The same tensors again and again, under new names."""
    for step in itertools.count():
        yield dataclasses.replace(manifests[step % len(manifests)], version=PolicyVersion(1, step))


# Ours


@dataclasses.dataclass
class Ours:
    pauses: list[float] = dataclasses.field(default_factory=list)
    worker: list[float] = dataclasses.field(default_factory=list)
    prepare: list[float] = dataclasses.field(default_factory=list)
    without: list[float] = dataclasses.field(default_factory=list)
    ratios: list[float] = dataclasses.field(default_factory=list)


async def measure_ours(folder: Path, manifests: list[Manifest], *, rounds: int, seconds: float) -> Ours:
    engine = VllmEngine(
        folder, num_slots=NUM_SEQUENCES, max_context=MAX_CONTEXT, dtype=torch.bfloat16, stream_tokens=1
    )
    versions, measured, fetcher = newer_versions(manifests), Ours(), WeightFetcher()
    try:
        await engine.start()
        for _ in range(NUM_VERSIONS):
            await install(engine, fetcher, next(versions))
        async with decoding(engine):
            await first_tokens(engine)
            await asyncio.sleep(WARM_UP_SECONDS)

            async def with_installs() -> float:
                tokens_per_second, _ = await asyncio.gather(
                    rate(engine, seconds),
                    install_every_second(engine, fetcher, versions, measured, seconds),
                )
                return tokens_per_second

            for number in range(rounds):
                # Neither kind of window is always the first of its round.
                if number % 2:
                    installing, without = await with_installs(), await rate(engine, seconds)
                else:
                    without, installing = await rate(engine, seconds), await with_installs()
                measured.without.append(without)
                measured.ratios.append(installing / without)
    finally:
        await engine.stop()
        fetcher.close()
    return measured


async def install(engine: VllmEngine, fetcher: WeightFetcher, manifest: Manifest) -> Any:
    staged = await asyncio.to_thread(fetcher.fetch, manifest, timeout_seconds=60, in_place=True)
    return await engine.install(staged)


async def install_every_second(
    engine: VllmEngine,
    fetcher: WeightFetcher,
    versions: Iterator[Manifest],
    measured: Ours,
    seconds: float,
) -> None:
    begun = time.perf_counter()
    for number in range(int(seconds)):
        await asyncio.sleep(max(0.0, begun + number - time.perf_counter()))
        started = time.perf_counter()
        report = await install(engine, fetcher, next(versions))
        measured.prepare.append(time.perf_counter() - started - report.pause_seconds)
        measured.pauses.append(report.pause_seconds)
        measured.worker.append(report.tensors_seconds)


@contextlib.asynccontextmanager
async def decoding(engine: VllmEngine) -> AsyncIterator[None]:
    """Keeps every slot busy; the sequences end at different times."""

    async def one_after_another(slot: int) -> None:
        for number in itertools.count():
            limit = MAX_CONTEXT - len(PROMPT)
            first = limit * (slot + 1) // NUM_SEQUENCES
            request = GenerationRequest(
                request_id=f"{slot}.{number}",
                prompt_ids=PROMPT,
                sampling=Sampling(max_tokens=limit if number else first),
            )
            async for _ in engine.generate(request):
                pass

    tasks = [asyncio.ensure_future(one_after_another(slot)) for slot in range(NUM_SEQUENCES)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def first_tokens(engine: VllmEngine) -> None:
    """Waits for them: what the engine compiles on its first run on a machine takes a minute."""
    deadline = time.perf_counter() + FIRST_TOKENS_SECONDS
    while not await rate(engine, 0.1):
        if time.perf_counter() > deadline:
            raise SystemExit(f"the engine made no token in {FIRST_TOKENS_SECONDS:.0f} s")


async def rate(engine: VllmEngine, seconds: float) -> float:
    """Tokens a second."""
    before, started = engine.stats().num_tokens, time.perf_counter()
    await asyncio.sleep(seconds)
    return (engine.stats().num_tokens - before) / (time.perf_counter() - started)


# The peer


async def measure_three_phase(
    folder: Path, manifests: list[Manifest], *, num_updates: int, seconds: float
) -> tuple[float, float]:
    """The median pause of an update in seconds, and tokens a second without one."""
    from harness.three_phase import BACKEND
    from vllm import SamplingParams
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(folder),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=MAX_CONTEXT,
        max_num_seqs=NUM_SEQUENCES,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        skip_tokenizer_init=True,
        worker_extension_cls="harness.three_phase.Extension",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
    )
    llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
    num_tokens = 0

    async def generate(slot: int) -> None:
        nonlocal num_tokens
        parameters = SamplingParams(
            max_tokens=MAX_CONTEXT - len(PROMPT), ignore_eos=True, detokenize=False, logprobs=0,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        for number in itertools.count():
            prompt = {"prompt_token_ids": PROMPT.tolist()}
            async for output in llm.generate(prompt, parameters, f"{slot}.{number}"):
                num_tokens += len(output.outputs[0].token_ids)

    tasks = [asyncio.ensure_future(generate(slot)) for slot in range(NUM_SEQUENCES)]
    try:
        await asyncio.sleep(WARM_UP_SECONDS)
        for task in tasks:
            if task.done():
                task.result()
        before, started = num_tokens, time.perf_counter()
        await asyncio.sleep(seconds)
        tokens_per_second = (num_tokens - before) / (time.perf_counter() - started)
        pauses = []
        for manifest in itertools.islice(newer_versions(manifests), num_updates):
            pauses.append(await update(llm, manifest))
            await asyncio.sleep(0.2)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.to_thread(llm.shutdown, 10.0)
    return median(pauses), tokens_per_second


async def update(llm: Any, manifest: Manifest) -> float:
    """vLLM's three phases, sent without a gap, as ours are; from the pause to the end of it."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    info = {
        "segment": manifest.media[0].name,  # type: ignore[union-attr]
        "num_bytes": manifest.num_bytes,
        "tensors": [(each.name, list(each.shape), each.offset, each.num_bytes) for each in manifest.tensors],
    }
    pause = asyncio.ensure_future(llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False))
    paused, *_, resumed = await asyncio.gather(
        when(llm.engine_core.call_utility_async("is_scheduler_paused")),
        llm.start_weight_update(),
        llm.update_weights(WeightTransferUpdateRequest(update_info=info)),
        llm.finish_weight_update(str(manifest.version)),
        when(llm.engine_core.resume_scheduler_async()),
    )
    pause.cancel()
    return float(resumed - paused)


async def when(call: Any) -> float:
    await call
    return time.perf_counter()


async def run(arguments: argparse.Namespace) -> dict[str, float]:
    config = policy_config()
    ring = SegmentRing(name_prefix="penstock-benchmark", num_segments=NUM_VERSIONS)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config.save_pretrained(folder)
            manifests = publish(ring, config)
            ours = await measure_ours(
                folder, manifests, rounds=arguments.rounds, seconds=arguments.window_seconds
            )
            pause, packed_rate = await measure_three_phase(
                folder, manifests, num_updates=arguments.updates, seconds=arguments.window_seconds
            )
    finally:
        ring.close()
    step_seconds = NUM_SEQUENCES / median(ours.without)
    return {
        "pause_over_decode_step": median(ours.pauses) / step_seconds,
        "worker_ms": 1000 * median(ours.worker),
        "speedup_over_three_phase": pause / median(ours.pauses),
        "throughput_ratio": median(ours.ratios),
        "throughput_ratio_low": float(np.quantile(ours.ratios, 0.25)),
        "throughput_ratio_high": float(np.quantile(ours.ratios, 0.75)),
        "pause_ms": 1000 * median(ours.pauses),
        "prepare_ms": 1000 * median(ours.prepare),
        "decode_step_ms": 1000 * step_seconds,
        "three_phase_pause_ms": 1000 * pause,
        "decode_over_packed": median(ours.without) / packed_rate,
        "num_installs": len(ours.pauses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12, help="a window without installs and one with, each")
    parser.add_argument("--window-seconds", type=float, default=8.0)
    parser.add_argument("--updates", type=int, default=9, help="of the peer")
    add_arguments(parser)
    arguments = parser.parse_args()
    try:
        require_engine("vllm")
    except ConfigError as error:
        print(f"skipped: {error}")
        return
    os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"
    logging.basicConfig(level=logging.WARNING)
    write(asyncio.run(run(arguments)), arguments)


if __name__ == "__main__":
    main()
