"""The engine for production: vLLM's AsyncLLM, in this process and those that it starts.

    this process                        EngineCore           worker(s)
      generate  -- request ------------> schedules --------> decode step
                <-- tokens, version ----                <---
      install   1 write a spare segment
                2 pause, switch, label, resume ---------> switch_weights (vllm_worker.py)

EngineCore handles messages between two decode steps, in the order in which they were
sent; so every token comes from one version, and the label that EngineCore puts on it
is that version's name. Running requests go on with the keys and values that they have.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from actors.engines.base import EngineStats, GenerationChunk, GenerationRequest, InstallReport, StopReason
from actors.engines.placement import Placement
from actors.engines.policy import Architecture, build_model, load_architecture
from actors.engines.tensors import TORCH_DTYPES, match
from penstock.errors import ConfigError, EngineFault, WeightTransferError
from penstock.trajectory import PolicyVersion, Sampling
from penstock.weights.manifest import ALIGNMENT, TensorEntry
from penstock.weights.segment import OwnedSegment, create_segment
from penstock.weights.staged import StagedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.v1.engine.async_llm import AsyncLLM

_log = logging.getLogger(__name__)

_START_SECONDS = 900.0
_INSTALL_SECONDS = 300.0
_STOP_SECONDS = 10.0
_RATE_SECONDS = 5.0
_WORKER = "actors.engines.vllm_worker.WeightInstaller"
_NUM_SEGMENTS = 2
_CPU_BLOCK = 128
_MAX_SHARE_OF_MEMORY = 0.5

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
        stream_tokens: int = 16,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
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
        self._stream_tokens = stream_tokens
        self._parallel = {
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
        }
        self._vllm: _Vllm | None = None
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
            names = vllm.check(staged)
            number, digest = await asyncio.to_thread(vllm.write, staged, names)
            if digest != staged.manifest.digest:
                raise WeightTransferError(
                    f"version {staged.manifest.version} has digest {digest} in the engine's segment; expected "
                    f"{staged.manifest.digest}; nothing was installed"
                )
            pause = await self._switch(vllm, number, staged.manifest.version)
        self._num_installs += 1
        self._max_install_seconds = max(self._max_install_seconds, pause)
        self._ready.set()
        return InstallReport(version=staged.manifest.version, digest=digest, pause_seconds=pause)

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

    async def _launch(self, dtype: torch.dtype) -> _Vllm:
        arguments = {
            "max_model_len": self._max_context,
            "max_num_seqs": self._num_slots,
            **self._parallel,
        }
        _log.info("starting vLLM in %s; this takes about a minute", dtype)
        launch = _Vllm.launch(self._folder, self._architecture, self._device, dtype, arguments)
        return await _within(_START_SECONDS, "vLLM to start", launch)

    async def _vllm_for(self, staged: StagedWeights) -> _Vllm:
        """vLLM in the version's dtype, if that is the first version."""
        vllm = self._running()
        dtypes = {TORCH_DTYPES[entry.dtype] for entry in staged.manifest.tensors}
        if self._installed is not None or dtypes == {vllm.dtype} or len(dtypes) != 1:
            return vllm
        self._vllm = None
        await vllm.stop(())
        self._vllm = await self._launch(dtypes.pop())
        return self._vllm

    async def _switch(self, vllm: _Vllm, number: int, version: PolicyVersion) -> float:
        try:
            pause = await _within(_INSTALL_SECONDS, "vLLM to switch weights", vllm.switch(number, version))
        except BaseException as error:
            # What is in place now is not known: no token may come from it.
            self._crash = error
            await vllm.stop(self._requests)
            if isinstance(error, Exception):
                raise EngineFault(f"vLLM failed while switching weights: {error}") from error
            raise
        self._installed = version
        return pause

    async def _stream(
        self, name: str, request: GenerationRequest, limit: int
    ) -> AsyncGenerator[GenerationChunk, None]:
        vllm = self._running()
        num_sent = 0
        async with contextlib.aclosing(
            vllm.generate(name, request, limit, self._stream_tokens, salt=str(self._installed))
        ) as outputs:
            async for output in outputs:
                self._tokens.add(len(output.token_ids))
                chunks = list(_chunks(output, num_sent))
                num_sent += len(output.token_ids)
                for chunk in chunks:
                    yield chunk

    def _running(self) -> _Vllm:
        if self._crash is not None:
            raise EngineFault(f"the engine crashed: {self._crash}") from self._crash
        if self._vllm is None:
            raise EngineFault("the engine is stopped" if self._stopped else "the engine was not started")
        return self._vllm

    def _limit(self, request: GenerationRequest) -> int:
        prompt, vocab_size = request.prompt_ids, self._architecture.vocab_size
        if prompt.ndim != 1 or prompt.size == 0 or prompt.dtype != np.int32:
            raise EngineFault(
                f"prompt of {prompt.dtype}{list(prompt.shape)}; expected int32 with a token or more"
            )
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise EngineFault(
                f"prompt holds token ids from {prompt.min()} to {prompt.max()}; expected 0 to {vocab_size - 1}"
            )
        return min(request.sampling.max_tokens, self._max_context - prompt.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """Tokens of one request, and the versions of all its tokens so far."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    version_starts: Sequence[tuple[str, int]]
    """(version, index of the first token that it sampled), in order."""
    stop_reason: StopReason | None


class _Vllm:
    """One AsyncLLM, and the segments that its workers have mapped."""

    def __init__(
        self, llm: AsyncLLM, model: PreTrainedModel, dtype: torch.dtype, stop_ids: Iterable[int]
    ) -> None:
        self._llm = llm
        self._model = model
        self._stop_ids = sorted(stop_ids)
        self._placement: Placement
        self._segments: list[OwnedSegment] = []
        self._current: int | None = None
        self.dtype = dtype

    @classmethod
    async def launch(
        cls,
        folder: Path,
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype,
        arguments: dict[str, Any],
    ) -> _Vllm:
        model = build_model(architecture, torch.device("meta"), dtype)
        llm = await asyncio.to_thread(_make, folder, model, device, arguments)
        vllm = cls(llm, model, dtype, architecture.stop_ids)
        try:
            await vllm._prepare()
        except BaseException:
            await vllm.stop(())
            raise
        return vllm

    def check(self, staged: StagedWeights) -> dict[str, str]:
        """Returns the names that the pieces have for the version's tensors. Raises WeightTransferError."""
        return {name: names[0] for names, _, _ in match(self._model, staged) for name in names}

    def write(self, staged: StagedWeights, names: dict[str, str]) -> tuple[int, str]:
        """Writes the segment that no weights lie in. Returns its number, and the digest of what it holds."""
        number = 0 if self._current is None else (self._current + 1) % _NUM_SEGMENTS
        return number, self._placement.write(staged, names, self._segments[number].segment.payload)

    async def switch(self, number: int, version: PolicyVersion) -> float:
        """Switches between two decode steps. Returns the seconds for which none could run."""
        core = self._llm.engine_core
        # With asynchronous scheduling a step may be under way, whose tokens are labelled when it ends.
        overlapping = self._llm.vllm_config.scheduler_config.async_scheduling
        pause = _timed(core.pause_scheduler_async(mode="keep", clear_cache=False))
        rest = (
            _timed(self._llm.collective_rpc("switch_weights", args=(number,))),
            _timed(core.set_weight_version_async(str(version))),
            _timed(core.resume_scheduler_async()),
        )
        if overlapping:
            paused = await pause
            *_, resumed = await asyncio.gather(*rest)
        else:
            paused, *_, resumed = await asyncio.gather(pause, *rest)
        self._current = number
        return resumed - paused

    async def generate(
        self, name: str, request: GenerationRequest, limit: int, stream_tokens: int, *, salt: str
    ) -> AsyncGenerator[_Output, None]:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = {"prompt_token_ids": request.prompt_ids.tolist(), "cache_salt": salt}
        parameters = _sampling(request.sampling, limit, self._stop_ids, stream_tokens)
        outputs = self._llm.generate(prompt, parameters, name)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield self._output(name, output.outputs[0])
        except (EngineDeadError, EngineGenerateError) as error:
            cause = error.__cause__ or error
            raise EngineFault(f"vLLM failed while computing this request: {cause}") from error

    async def stop(self, requests: Iterable[str]) -> None:
        """Ends requests as aborted, then the processes; kills those that do not end by themselves."""
        from vllm.v1.engine.exceptions import EngineDeadError

        with contextlib.suppress(EngineDeadError):
            await self._llm.abort(list(requests))
        await asyncio.to_thread(self._llm.shutdown, _STOP_SECONDS)
        # __del__ would do so once more, when the modules that it needs may be gone.
        self._llm.shutdown = lambda: None

    async def _prepare(self) -> None:
        """Finds out where tensors go, and has the workers map two segments."""
        tensors = _checkpoint(self._model, self.dtype)
        rows = [(each.name, each.dtype, list(each.shape), each.offset) for each in tensors]
        share = self._llm.vllm_config.parallel_config.world_size == 1
        try:
            plans = await self._llm.collective_rpc("plan_weights", args=(rows, share))
        except Exception as error:  # vLLM wraps whatever its worker raised in it
            raise ConfigError(
                f"vLLM cannot change the weights of {type(self._model).__name__} in place: {error}; "
                "use the torch engine"
            ) from error
        num_bytes, pieces = plans[0]
        self._placement = Placement.of(tensors, pieces, num_bytes)
        for _ in range(_NUM_SEGMENTS):
            segment = create_segment(f"penstock-vllm-{os.getpid()}", num_bytes)
            self._segments.append(segment)
            try:
                await self._llm.collective_rpc("attach_segment", args=(segment.segment.name, num_bytes))
            finally:
                # Who has it mapped keeps it; nothing is left behind, however this process ends.
                segment.remove()

    def _output(self, name: str, output: Any) -> _Output:
        if output.weight_versions is not None:
            starts = [(span.version, span.start) for span in output.weight_versions]
        else:
            processor = self._llm.output_processor
            state = processor.request_states[processor.external_req_ids[name][0]]
            starts = state.weight_version_starts
        return _Output(
            token_ids=output.token_ids,
            logprobs=[
                position[token].logprob
                for token, position in zip(output.token_ids, output.logprobs or (), strict=True)
            ],
            version_starts=starts,
            stop_reason=_STOP_REASONS[output.finish_reason],
        )


_STOP_REASONS = {
    None: None,
    "stop": StopReason.STOP,
    "length": StopReason.LENGTH,
    "abort": StopReason.ABORTED,
}


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


def _make(folder: Path, model: PreTrainedModel, device: torch.device, arguments: dict[str, Any]) -> AsyncLLM:
    """Starts vLLM. Blocks for about a minute."""
    _set_environment(device)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if current_platform.device_type != device.type:
        raise ConfigError(
            f"device is {str(device)!r}, but the installed vLLM is built for {current_platform.device_type!r}"
        )
    text = model.config.get_text_config()
    if device.type == "cpu":
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": _cache_bytes(text, model.dtype, arguments),
        }
    settings = AsyncEngineArgs(
        model=str(folder),
        load_format="dummy",
        dtype=str(model.dtype).removeprefix("torch."),
        hf_overrides={"architectures": [type(model).__name__]},
        skip_tokenizer_init=True,
        generation_config="vllm",
        seed=secrets.randbits(31),
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=_WORKER,
        disable_log_stats=True,
        **arguments,
    )
    # Ctrl-C reaches a whole terminal: what this process drains, its children must still compute.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return AsyncLLM.from_engine_args(settings)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"vLLM cannot run the policy {folder}: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _set_environment(device: torch.device) -> None:
    """Settings of vLLM's that are environment variables; what the user has set is kept."""
    os.environ["PENSTOCK_ENGINE_OWNER"] = str(os.getpid())
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    if "OMP_NUM_THREADS" in os.environ:
        # Else each engine of a machine takes all its cores.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if device.index is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            visible.split(",")[device.index] if visible else str(device.index)
        )


def _cache_bytes(text: Any, dtype: torch.dtype, arguments: dict[str, Any]) -> int:
    """Room for every slot's whole context, but at most half of the free memory."""
    head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    num_layers: int = text.num_hidden_layers
    block_bytes = _CPU_BLOCK * 2 * num_layers * num_heads * head_dim * dtype.itemsize
    num_blocks: int = arguments["max_num_seqs"] * -(-arguments["max_model_len"] // _CPU_BLOCK) + 1
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(num_blocks * block_bytes, int(free * _MAX_SHARE_OF_MEMORY))


def _sampling(sampling: Sampling, limit: int, stop_ids: list[int], stream_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=limit,
        seed=sampling.seed % 2**63 or None,
        stop_token_ids=stop_ids,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=stream_tokens,
    )


def _chunks(output: _Output, first: int) -> Iterable[GenerationChunk]:
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


def _checkpoint(model: PreTrainedModel, dtype: torch.dtype) -> list[TensorEntry]:
    """The model's tensors, each once, packed one after another."""
    name_of_dtype = {value: key for key, value in TORCH_DTYPES.items()}
    tensors: list[TensorEntry] = []
    seen: set[int] = set()
    end = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + tensor.numel() * dtype.itemsize
        tensors.append(
            TensorEntry(
                name=name, dtype=name_of_dtype[dtype], shape=tuple(tensor.shape), offset=offset,
                num_bytes=end - offset,
            )
        )  # fmt: skip
    return tensors


async def _timed(call: Awaitable[object]) -> float:
    """When a call was answered."""
    await call
    return time.perf_counter()


async def _within(seconds: float, waiting_for: str, result: Awaitable[ResultT]) -> ResultT:
    try:
        async with asyncio.timeout(seconds):
            return await result
    except TimeoutError:
        raise EngineFault(f"waited {seconds} s for {waiting_for}") from None
