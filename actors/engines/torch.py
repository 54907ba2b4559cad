"""The embedded engine: a transformers model, continuous batching, any device.

    event loop                               compute thread (Worker)
      generate, install   -- commands -->      between two steps
      streams             <-- emissions --     prefill, decode, prefill, decode, ...

All computing is done by one thread, so that an install falls between two decode steps
by construction, and the event loop never waits but in `await`.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.engines.base import EngineStats, GenerationChunk, GenerationRequest, InstallReport, check_prompt
from actors.engines.decoder import Decoder, Emission, Running, prompt_logits
from actors.engines.policy import Architecture, build_model, load_architecture
from actors.engines.slots import Prefill, SlotCache
from actors.engines.tensors import WeightUpdate, adopt_dtypes, plan_update
from actors.engines.worker import Worker
from penstock.errors import ConfigError, EngineFault
from penstock.trajectory import InstallMode, PolicyVersion
from penstock.weights.staged import StagedWeights

_START_SECONDS = 600.0
_INSTALL_SECONDS = 300.0
_STOP_SECONDS = 10.0

ResultT = TypeVar("ResultT")


class TorchEngine:
    """Implements actors.engines.base.Engine for every causal LM with a standard cache."""

    def __init__(
        self,
        policy: Path,
        *,
        num_slots: int = 64,
        max_context: int | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        install_mode: InstallMode = InstallMode.KEEP,
        stream_seconds: float = 0.25,
    ) -> None:
        """
        policy: a Hugging Face folder; only its configuration and tokeniser are read.
        max_context: at most, and by default, what the policy was made for.
        dtype: weights are converted to it; by default they stay what the first version has.
        stream_seconds: how often a running request's tokens are handed out.
        Raises ConfigError.
        """
        if num_slots < 1:
            raise ConfigError(f"num_slots is {num_slots}; expected at least 1")
        self._architecture = load_architecture(policy)
        limit = self._architecture.max_context
        if max_context is not None and not 2 <= max_context <= limit:
            raise ConfigError(f"max_context is {max_context}; expected 2 to {limit}, the policy's own limit")
        self._num_slots = num_slots
        self._max_context = max_context or limit
        self._device = _device(device)
        self._dtype = dtype
        self._install_mode = install_mode
        self._stream_seconds = stream_seconds
        self._model: PreTrainedModel | None = None
        self._decoder: Decoder | None = None
        self._worker: Worker | None = None
        self._streams: dict[Running, _Stream] = {}
        self._seeds = random.Random(secrets.randbits(64))
        self._stopped = False
        self._crash: Exception | None = None
        self._num_installs = 0
        self._max_install_seconds = 0.0

    @property
    def verifies(self) -> bool:
        return False

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def installed(self) -> PolicyVersion | None:
        return None if self._decoder is None else self._decoder.version

    async def start(self) -> None:
        """Builds the model and tries it out. Raises ConfigError, EngineFault."""
        if self._model is not None or self._stopped:
            raise EngineFault("the engine was started before; make a new one")
        build = asyncio.to_thread(_build, self._architecture, self._device, self._dtype)
        self._model = await _within(_START_SECONDS, "the model to be built", build)
        self._decoder = Decoder(
            self._model, self._architecture, num_slots=self._num_slots, max_context=self._max_context
        )
        outbox = _LoopOutbox(asyncio.get_running_loop(), self)
        self._worker = Worker(self._decoder, outbox, stream_seconds=self._stream_seconds)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Streams a completion. Waits while no version is installed. Raises EngineFault.

        Closing the iterator early aborts the request.
        """
        worker = self._running()
        sequence = self._sequence(request)
        stream = _Stream(sequence)
        self._streams[sequence] = stream
        worker.call(lambda decoder: decoder.submit(sequence))
        complete = False
        try:
            while not complete:
                chunk = await stream.next()
                complete = chunk.stop_reason is not None
                yield chunk
        finally:
            del self._streams[sequence]
            if not complete:
                worker.call(lambda decoder: decoder.abandon(sequence))

    async def install(self, staged: StagedWeights) -> InstallReport:
        """Switches to a verified version between two decode steps.

        Either every tensor is switched or none is. Raises WeightTransferError.
        """
        worker, model = self._running(), self._model
        assert model is not None
        if self._dtype is None and self.installed is None:
            adopt = asyncio.wrap_future(worker.call(lambda _: adopt_dtypes(model, staged)))
            await _within(_INSTALL_SECONDS, "the engine to adopt the version's dtypes", adopt)
        convert = self._dtype is not None
        update = await asyncio.to_thread(plan_update, model, staged, convert=convert)
        switch = asyncio.wrap_future(
            worker.call(lambda decoder: _switch(decoder, update, self._install_mode))
        )
        report = await _within(_INSTALL_SECONDS, "the decode step before the install", switch)
        self._num_installs += 1
        self._max_install_seconds = max(self._max_install_seconds, report.pause_seconds)
        return report

    def stats(self) -> EngineStats:
        decoder, worker = self._decoder, self._worker
        return EngineStats(
            num_running=0 if decoder is None else decoder.num_running,
            num_waiting=0 if decoder is None else decoder.num_waiting,
            num_tokens=0 if decoder is None else decoder.num_sampled,
            tokens_per_second=0.0 if worker is None else worker.tokens_per_second,
            num_installs=self._num_installs,
            max_install_seconds=self._max_install_seconds,
        )

    async def stop(self) -> None:
        """Ends every request with ABORTED and frees the engine. May be called twice."""
        self._stopped = True
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if not await asyncio.to_thread(worker.stop, _STOP_SECONDS):
            hung = EngineFault(f"the engine's decode step did not end in {_STOP_SECONDS} s")
            self.fail(list(self._streams), hung)
            raise hung
        self._model = self._decoder = None

    def deliver(self, emissions: Sequence[Emission]) -> None:
        """In the event loop: hands chunks to their streams."""
        for emission in emissions:
            stream = self._streams.get(emission.sequence)
            if stream is not None:
                stream.put(emission.chunks)

    def fail(self, sequences: Sequence[Running], error: Exception) -> None:
        """In the event loop: ends streams with an EngineFault."""
        for sequence in sequences:
            stream = self._streams.get(sequence)
            if stream is not None:
                stream.fail(error)

    def crash(self, error: Exception) -> None:
        """In the event loop: the compute thread is dead, and every request with it."""
        self._crash = error
        self.fail(list(self._streams), error)

    def _running(self) -> Worker:
        if self._crash is not None:
            raise EngineFault(f"the engine crashed: {self._crash}") from self._crash
        if self._worker is None:
            raise EngineFault("the engine is stopped" if self._stopped else "the engine was not started")
        return self._worker

    def _sequence(self, request: GenerationRequest) -> Running:
        check_prompt(request, self._architecture.vocab_size)
        limit = min(request.sampling.max_tokens, self._max_context - request.prompt_ids.size)
        return Running(request, seed=request.sampling.seed or self._seeds.getrandbits(64), limit=limit)


class _LoopOutbox:
    """Carries results from the compute thread into the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: TorchEngine) -> None:
        self._loop = loop
        self._engine = engine

    def deliver(self, emissions: Sequence[Emission]) -> None:
        self._loop.call_soon_threadsafe(self._engine.deliver, emissions)

    def fail(self, sequences: Sequence[Running], error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._engine.fail, sequences, error)

    def crash(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._engine.crash, error)


class _Stream:
    """One request's chunks on their way to its reader, at most a flush and the last ones."""

    def __init__(self, sequence: Running) -> None:
        self._sequence = sequence
        self._chunks: deque[GenerationChunk] = deque()
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, chunks: Sequence[GenerationChunk]) -> None:
        self._chunks.extend(chunks)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    async def next(self) -> GenerationChunk:
        """Waits for the compute thread, which ends every stream: by a last chunk or an error."""
        while not self._chunks:
            if self._error is not None:
                raise EngineFault(
                    f"the engine failed while computing this request: {self._error}"
                ) from self._error
            self._changed.clear()
            self._sequence.unread = False
            await self._changed.wait()
        return self._chunks.popleft()


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {error}") from error


def _build(architecture: Architecture, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """Builds the model, and runs one token through it: what it lacks is told at the start."""
    model = build_model(architecture, device, dtype or torch.float32)
    cache = SlotCache(
        num_layers=architecture.config.get_text_config().num_hidden_layers, num_slots=1, max_context=1
    )
    first = torch.zeros(1, dtype=torch.int64, device=device)
    cache.step = Prefill(rows_B=first, slots_B=first)
    try:
        with torch.inference_mode():
            prompt_logits(model, cache, [np.zeros(1, dtype=np.int32)])
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"the torch engine cannot run {type(model).__name__}: {error}") from error
    if not all(layer.is_initialized for layer in cache.slot_layers):
        raise ConfigError(
            f"{type(model).__name__} has layers without a key-value cache, which the torch engine cannot run; "
            "use the vllm engine"
        )
    return model


def _switch(decoder: Decoder, update: WeightUpdate, mode: InstallMode) -> InstallReport:
    """In the compute thread, between two steps."""
    started = time.perf_counter()
    manifest = update.staged.manifest
    try:
        update.apply()
    except BaseException:
        # Half a version is in place: no token may come from it.
        decoder.version = None
        raise
    decoder.switch_version(manifest.version, mode)
    seconds = time.perf_counter() - started
    return InstallReport(
        version=manifest.version, digest=manifest.digest, pause_seconds=seconds, tensors_seconds=seconds
    )


async def _within(seconds: float, waiting_for: str, result: Awaitable[ResultT]) -> ResultT:
    try:
        async with asyncio.timeout(seconds):
            return await result
    except TimeoutError:
        raise EngineFault(f"waited {seconds} s for {waiting_for}") from None
