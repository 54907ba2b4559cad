"""One AsyncLLM: how it starts, what its workers have mapped, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from actors.engines.base import GenerationRequest, StopReason
from actors.engines.host_ring import HostRing
from actors.engines.placement import Placement
from actors.engines.policy import Architecture, build_model
from actors.engines.tensors import TORCH_DTYPES, match
from penstock.errors import ConfigError, EngineFault
from penstock.seeds import derive_seed
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import ALIGNMENT, TensorEntry
from penstock.weights.staged import StagedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.v1.engine.async_llm import AsyncLLM

_STOP_SECONDS = 10.0
_WORKER = "actors.engines.vllm_worker.WeightInstaller"
_PREPARE_SECONDS = 120.0
_PREPARE_NICENESS = 15
_CPU_BLOCK = 128
_MAX_SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Tokens of one request, and the versions of all its tokens so far."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    version_starts: Sequence[tuple[str, int]]
    """(version, index of the first token that it sampled), in order."""
    stop_reason: StopReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """What one switch of weights took."""

    pause_seconds: float
    """For how long no decode step could run."""
    tensors_seconds: float
    """Of them, for switching the tensors in the slowest worker."""


class VllmHost:
    """One AsyncLLM, and the segments that its workers have mapped."""

    def __init__(
        self, llm: AsyncLLM, model: PreTrainedModel, dtype: torch.dtype, stop_ids: Iterable[int]
    ) -> None:
        self._llm = llm
        # With asynchronous scheduling, steps overlap: a message may arrive while one is under way.
        self._overlapping: bool = llm.vllm_config.scheduler_config.async_scheduling
        self._model = model
        self._stop_ids = sorted(stop_ids)
        self._placement: Placement
        self._ring: HostRing | None = None
        self._attached: dict[str, int] = {}
        self._current: str | None = None
        self._stopping = threading.Event()
        self._preparing = ThreadPoolExecutor(1, "prepare weights", initializer=_yield_to_decoding)
        self._num_switches = 0
        self.dtype = dtype

    @classmethod
    async def launch(
        cls,
        folder: Path,
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype,
        arguments: dict[str, Any],
    ) -> VllmHost:
        model = build_model(architecture, torch.device("meta"), dtype)
        llm = await asyncio.to_thread(_make, folder, model, device, arguments)
        vllm = cls(llm, model, dtype, architecture.stop_ids)
        try:
            await vllm._prepare()
        except BaseException:
            await vllm.stop(())
            raise
        return vllm

    async def prepare(self, staged: StagedWeights) -> str:
        """Brings a version to where the workers can switch to it. Returns its segment's name.

        What they compute with is not touched. Raises WeightTransferError.
        """
        loop = asyncio.get_running_loop()
        name = await loop.run_in_executor(self._preparing, self._hold, staged)
        try:
            if name not in self._attached:
                numbers = await self._llm.collective_rpc(
                    "attach_segment", args=(name, self._placement.num_bytes)
                )
                self._attached[name] = numbers[0]
        except BaseException:
            self._release(name)
            raise
        return name

    def _hold(self, staged: StagedWeights) -> str:
        assert self._ring is not None
        return self._ring.hold(
            staged.manifest.digest,
            lambda payload: self._write(staged, payload),
            timeout_seconds=_PREPARE_SECONDS,
            abandoned=self._stopping,
        )

    def _write(self, staged: StagedWeights, payload: NDArray[np.uint8]) -> str:
        names = {name: names[0] for names, _, _ in match(self._model, staged) for name in names}
        return self._placement.write(staged, names, payload)

    def _release(self, name: str) -> None:
        if self._ring is not None:
            self._ring.release(name)

    async def switch(self, name: str, version: PolicyVersion) -> Switch:
        """Switches between two decode steps."""
        core = self._llm.engine_core
        pause = asyncio.ensure_future(core.pause_scheduler_async(mode="keep", clear_cache=False))
        try:
            if self._overlapping:
                # The tokens of a step that is under way are labelled when it ends.
                await pause
            paused, seconds, _, resumed = await asyncio.gather(
                _timed(core.call_utility_async("is_scheduler_paused")),
                self._llm.collective_rpc("switch_weights", args=(self._attached[name],)),
                core.set_weight_version_async(str(version)),
                _timed(core.resume_scheduler_async()),
            )
        finally:
            # It holds at once, but is answered only when nothing at all is left to do.
            pause.cancel()
        before, self._current = self._current, name
        if before is not None:
            self._release(before)
        self._num_switches += 1
        return Switch(pause_seconds=resumed - paused, tensors_seconds=max(seconds))

    async def generate(
        self, name: str, request: GenerationRequest, limit: int, stream_tokens: int
    ) -> AsyncGenerator[Output, None]:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        # vllm_scheduler gives another salt if weights are switched before the request begins.
        salt = str(self._num_switches)
        prompt = {"prompt_token_ids": request.prompt_ids.tolist(), "cache_salt": salt}
        parameters = _sampling(request, limit, self._stop_ids, stream_tokens)
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
        self._stopping.set()
        await asyncio.to_thread(self._preparing.shutdown)
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()
        # __del__ would do so once more, when the modules that it needs may be gone.
        self._llm.shutdown = lambda: None

    async def _prepare(self) -> None:
        """Finds out where tensors go."""
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
        layout = blake3(repr((rows, pieces, num_bytes)).encode()).hexdigest(8)
        self._ring = HostRing(layout=layout, num_bytes=num_bytes)

    def _output(self, name: str, output: Any) -> Output:
        if output.weight_versions is not None:
            starts = [(span.version, span.start) for span in output.weight_versions]
        else:
            processor = self._llm.output_processor
            state = processor.request_states[processor.external_req_ids[name][0]]
            starts = state.weight_version_starts
        return Output(
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


def _sampling(request: GenerationRequest, limit: int, stop_ids: list[int], stream_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=limit,
        # A turn must not draw the numbers of the turn before it: they have one seed, and grow in length.
        seed=derive_seed(sampling.seed, request.prompt_ids.size) if sampling.seed else None,
        stop_token_ids=stop_ids,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=stream_tokens,
    )


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


def _yield_to_decoding() -> None:
    """Lowers this thread's priority: preparing a version takes no time from the decode loop."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _PREPARE_NICENESS)


async def _timed(call: Awaitable[object]) -> float:
    """When a call was answered."""
    await call
    return time.perf_counter()
