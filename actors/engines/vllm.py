"""The engine for production: vLLM's AsyncLLM, in this process and those that it starts.

    this process                        EngineCore           worker(s)
      generate  -- request ------------> schedules --------> decode step
                <-- tokens, version ----                <---
      install   1 prepare a spare segment (host_ring.py)
                2 pause, switch, label, resume ---------> switch_weights (vllm_worker.py)

EngineCore handles messages between two decode steps, in the order in which they were
sent; so every token comes from one version, and the label that EngineCore puts on it
is that version's name. Running requests go on with the keys and values that they have,
or are read again (vllm_scheduler.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from actors.engines.base import (
    EngineStats,
    GenerationChunk,
    GenerationRequest,
    InstallReport,
    StopReason,
    check_prompt,
)
from actors.engines.policy import Architecture, load_architecture
from actors.engines.tensors import TORCH_DTYPES
from actors.engines.vllm_host import Output, Switch, VllmHost
from penstock.errors import ConfigError, EngineFault
from penstock.trajectory import InstallMode, PolicyVersion
from penstock.weights.staged import StagedWeights

_log = logging.getLogger(__name__)

_SCHEDULER = "actors.engines.vllm_scheduler"
_START_SECONDS = 900.0
_INSTALL_SECONDS = 300.0
_RATE_SECONDS = 5.0

ResultT = TypeVar("ResultT")


class VllmEngine:
    """Implements actors.engines.base.Engine with vLLM, for the architectures that vLLM runs."""

    def __init__(
        self,
        policy: Path,
        *,
        device: str = "cpu",
        num_slots: int = 64,
        max_context: int | None = None,
        dtype: torch.dtype | None = None,
        install_mode: InstallMode = InstallMode.KEEP,
        stream_tokens: int = 16,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
    ) -> None:
        """
        policy: a Hugging Face folder; only its configuration is read.
        max_context: at most, and by default, what the policy was made for.
        dtype: of weights and computation; by default the configuration's. If the first version has
            another, the engine starts again with that.
        stream_tokens: how many tokens of a running request are handed out together.
        Raises ConfigError.
        """
        if num_slots < 1:
            raise ConfigError(f"num_slots is {num_slots}; expected at least 1")
        self._folder = policy
        self._device = torch.device(device)
        self._architecture = load_architecture(policy)
        limit = self._architecture.max_context
        if max_context is not None and not 2 <= max_context <= limit:
            raise ConfigError(f"max_context is {max_context}; expected 2 to {limit}, the policy's own limit")
        self._num_slots = num_slots
        self._max_context = max_context or limit
        self._dtype = dtype or _configured_dtype(self._architecture)
        self._install_mode = install_mode
        self._stream_tokens = stream_tokens
        self._parallel = {
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "data_parallel_size": data_parallel_size,
        }
        self._vllm: VllmHost | None = None
        self._installed: PolicyVersion | None = None
        self._ready = asyncio.Event()
        self._install_lock = asyncio.Lock()
        self._stopped = False
        self._crash: BaseException | None = None
        self._requests: set[str] = set()
        self._tokens = _TokenCount()
        self._num_installs = 0
        self._max_install_seconds = 0.0

    @property
    def verifies(self) -> bool:
        return True

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def installed(self) -> PolicyVersion | None:
        return self._installed

    async def start(self) -> None:
        """Starts vLLM's processes, which takes about a minute. Raises ConfigError, EngineFault."""
        if self._vllm is not None or self._stopped:
            raise EngineFault("the engine was started before; make a new one")
        self._vllm = await self._launch(self._dtype)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """Streams a completion. Waits while no version is installed. Raises EngineFault.

        Closing the iterator early aborts the request.
        """
        self._running()
        limit = self._limit(request)
        name = f"{request.request_id}.{secrets.token_hex(4)}"
        self._requests.add(name)
        try:
            await self._ready.wait()
            if self._stopped or limit < 1:
                version = self._installed or PolicyVersion(0, 0)
                reason = StopReason.ABORTED if self._stopped else StopReason.LENGTH
                yield GenerationChunk(token_ids=(), logprobs=(), version=version, stop_reason=reason)
                return
            async with contextlib.aclosing(self._stream(name, request, limit)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self._requests.discard(name)

    async def install(self, staged: StagedWeights) -> InstallReport:
        """Switches to a verified version between two decode steps.

        Either every tensor is switched or none is. Raises WeightTransferError.
        """
        async with self._install_lock:
            vllm = await self._vllm_for(staged)
            segment = await vllm.prepare(staged)
            switch = await self._switch(vllm, segment, staged.manifest.version)
        self._num_installs += 1
        self._max_install_seconds = max(self._max_install_seconds, switch.pause_seconds)
        self._ready.set()
        return InstallReport(
            version=staged.manifest.version,
            digest=staged.manifest.digest,
            pause_seconds=switch.pause_seconds,
            tensors_seconds=switch.tensors_seconds,
        )

    def stats(self) -> EngineStats:
        num_running = min(len(self._requests), self._num_slots) if self._ready.is_set() else 0
        return EngineStats(
            num_running=num_running,
            num_waiting=len(self._requests) - num_running,
            num_tokens=self._tokens.total,
            tokens_per_second=self._tokens.per_second(),
            num_installs=self._num_installs,
            max_install_seconds=self._max_install_seconds,
        )

    async def stop(self) -> None:
        """Ends every request with ABORTED and frees the engine. May be called twice."""
        self._stopped = True
        self._ready.set()
        vllm, self._vllm = self._vllm, None
        if vllm is not None:
            await vllm.stop(self._requests)

    async def _launch(self, dtype: torch.dtype) -> VllmHost:
        arguments = {
            "max_model_len": self._max_context,
            "max_num_seqs": -(-self._num_slots // self._parallel["data_parallel_size"]),
            "scheduler_cls": f"{_SCHEDULER}.{self._install_mode}",
            **self._parallel,
        }
        _log.info("starting vLLM in %s; this takes about a minute", dtype)
        launch = VllmHost.launch(self._folder, self._architecture, self._device, dtype, arguments)
        return await _within(_START_SECONDS, "vLLM to start", launch)

    async def _vllm_for(self, staged: StagedWeights) -> VllmHost:
        """vLLM in the version's dtype, if that is the first version."""
        vllm = self._running()
        dtypes = {TORCH_DTYPES[entry.dtype] for entry in staged.manifest.tensors}
        if self._installed is not None or dtypes == {vllm.dtype} or len(dtypes) != 1:
            return vllm
        self._vllm = None
        await vllm.stop(())
        self._vllm = await self._launch(dtypes.pop())
        return self._vllm

    async def _switch(self, vllm: VllmHost, segment: str, version: PolicyVersion) -> Switch:
        try:
            switch = await _within(_INSTALL_SECONDS, "vLLM to switch weights", vllm.switch(segment, version))
        except BaseException as error:
            # What is in place now is not known: no token may come from it.
            self._crash = error
            await vllm.stop(self._requests)
            if isinstance(error, Exception):
                raise EngineFault(f"vLLM failed while switching weights: {error}") from error
            raise
        self._installed = version
        return switch

    async def _stream(
        self, name: str, request: GenerationRequest, limit: int
    ) -> AsyncGenerator[GenerationChunk, None]:
        vllm = self._running()
        num_sent = 0
        async with contextlib.aclosing(vllm.generate(name, request, limit, self._stream_tokens)) as outputs:
            async for output in outputs:
                self._tokens.add(len(output.token_ids))
                chunks = list(_chunks(output, num_sent))
                num_sent += len(output.token_ids)
                for chunk in chunks:
                    yield chunk

    def _running(self) -> VllmHost:
        if self._crash is not None:
            raise EngineFault(f"the engine crashed: {self._crash}") from self._crash
        if self._vllm is None:
            raise EngineFault("the engine is stopped" if self._stopped else "the engine was not started")
        return self._vllm

    def _limit(self, request: GenerationRequest) -> int:
        check_prompt(request, self._architecture.vocab_size)
        return min(request.sampling.max_tokens, self._max_context - request.prompt_ids.size)


class _TokenCount:
    """How many tokens were handed out, and how fast over the last few seconds."""

    def __init__(self) -> None:
        self.total = 0
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, num_tokens: int) -> None:
        self.total += num_tokens
        now = time.monotonic()
        self._recent.append((now, self.total))
        while self._recent[0][0] < now - _RATE_SECONDS:
            self._recent.popleft()

    def per_second(self) -> float:
        recent = [each for each in self._recent if each[0] >= time.monotonic() - _RATE_SECONDS]
        if len(recent) < 2:
            return 0.0
        return (recent[-1][1] - recent[0][1]) / max(recent[-1][0] - recent[0][0], 1e-3)


def _chunks(output: Output, first: int) -> Iterable[GenerationChunk]:
    """Splits an output, whose first token is the request's token `first`, where versions change."""
    starts = output.version_starts
    end = first + len(output.token_ids)
    spans = []
    for index, (label, start) in enumerate(starts):
        stop = min(end, starts[index + 1][1] if index + 1 < len(starts) else end)
        if max(start, first) < stop:
            spans.append((_version(label), max(start, first) - first, stop - first))
    for index, (version, start, stop) in enumerate(spans):
        yield GenerationChunk(
            token_ids=tuple(output.token_ids[start:stop]),
            logprobs=tuple(output.logprobs[start:stop]),
            version=version,
            stop_reason=output.stop_reason if index == len(spans) - 1 else None,
        )
    if not spans and output.stop_reason is not None:
        version = _version(starts[-1][0]) if starts else PolicyVersion(0, 0)
        yield GenerationChunk(token_ids=(), logprobs=(), version=version, stop_reason=output.stop_reason)


def _version(text: str) -> PolicyVersion:
    epoch, step = text.split(".")
    return PolicyVersion(int(epoch), int(step))


def _configured_dtype(architecture: Architecture) -> torch.dtype:
    configured = getattr(architecture.config.get_text_config(), "dtype", None)
    return next((dtype for dtype in TORCH_DTYPES.values() if dtype == configured), torch.float32)


async def _within(seconds: float, waiting_for: str, result: Awaitable[ResultT]) -> ResultT:
    try:
        async with asyncio.timeout(seconds):
            return await result
    except TimeoutError:
        raise EngineFault(f"waited {seconds} s for {waiting_for}") from None
