"""Runs in vLLM's worker processes: switches the model's weights between two decode steps.

vLLM imports this module in each worker (as `worker_extension_cls`) before it makes the
model. The engine's calls arrive as methods of the worker, between two steps:

    plan_weights       once: finds out where each of a checkpoint's tensors goes
    attach_segment     once a segment: maps it, and makes what a switch needs
    switch_weights     each install: every tensor, at once

On a CPU the parameters are pointed at a segment in the model's own layout, so that a
switch copies nothing; otherwise they are copied into, where CUDA graphs know them.
Both need weights that stay as they are after loading. vLLM's CPU kernels would pack
them into handles of oneDNN's; this module turns that off. It also ends vLLM's
processes when the actor's is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import vllm._custom_ops
import vllm.model_executor.layers.utils
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import base_loader

from actors.engines.tensors import TORCH_DTYPES
from penstock.weights.manifest import ALIGNMENT, SharedMemoryMedium
from penstock.weights.segment import open_segment

_END_SECONDS = 10.0

TensorRow = tuple[str, str, list[int], int]
"""Of a checkpoint's tensor: name, dtype by safetensors' name, shape, offset in bytes."""
PieceRow = tuple[int, int, int]
"""Bytes that lie together in checkpoint and segment: offset in either, number."""


_repacked: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def keep_weights_in_place() -> None:
    """On a CPU: lets linear layers multiply by their parameters, and not by packed copies of them."""
    vllm._custom_ops._supports_onednn = False
    vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda *_: False


def note_repacked_parameters() -> None:
    """Takes down which parameters of each model are not as they were loaded any more."""
    process = base_loader.process_weights_after_loading

    def process_and_compare(model: nn.Module, *args: Any) -> None:
        before = {name: (each, each.data_ptr()) for name, each in model.named_parameters()}
        process(model, *args)
        after = dict(model.named_parameters())
        _repacked[model] = sorted(
            name
            for name, (parameter, pointer) in before.items()
            if name in after and (after[name] is not parameter or after[name].data_ptr() != pointer)
        )

    base_loader.process_weights_after_loading = process_and_compare


def end_with(owner: int) -> None:
    """Ends EngineCore, this worker's parent, when the actor is gone; by itself it would stay for ever."""
    core = os.getppid()
    with contextlib.suppress(ProcessLookupError):
        actor = os.pidfd_open(owner)
        select.select([actor], [], [])
    with contextlib.suppress(ProcessLookupError):
        os.kill(core, signal.SIGTERM)
        time.sleep(_END_SECONDS)
        os.kill(core, signal.SIGKILL)
    os._exit(1)


keep_weights_in_place()
note_repacked_parameters()
if owner := os.environ.get("PENSTOCK_ENGINE_OWNER"):
    threading.Thread(target=end_with, args=(int(owner),), name="end with the actor", daemon=True).start()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copy:
    """One copy that loading a checkpoint makes."""

    target: Tensor
    """View of a parameter."""
    source: Tensor
    """View of the checkpoint's bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Region:
    """Where a segment holds the whole of a parameter."""

    parameter: Tensor
    offset: int


class WeightInstaller:
    """What the worker's class is extended by. Its methods run between two decode steps."""

    model_runner: Any
    vllm_config: Any

    def plan_weights(self, tensors: Sequence[TensorRow], share: bool) -> tuple[int, list[PieceRow]]:
        """Loads a checkpoint of zeros, and takes down what goes where.

        share: point parameters at segments, if it can be.
        Returns the segments' size, and what the engine has to write where in them. Raises
        ValueError if the model cannot be updated in place.
        """
        model = self.model_runner.get_model()
        if _repacked[model]:
            raise ValueError(f"vLLM packs weights of this model: {', '.join(_repacked[model][:3])}")
        num_bytes = max(offset + _num_bytes(dtype, shape) for _, dtype, shape, offset in tensors)
        checkpoint = torch.zeros(num_bytes, dtype=torch.uint8)
        with (
            set_current_vllm_config(self.vllm_config),
            torch.no_grad(),
            _CopyRecorder(checkpoint) as recorder,
        ):
            model.load_weights([(row[0], _view(checkpoint, row)) for row in tensors])
        _check_coverage(model, recorder.copies)
        self.penstock_copies = recorder.copies
        self.penstock_regions: list[Region] | None = None
        self.penstock_switches: list[list[tuple[Tensor, Tensor]]] = []
        pieces = _shared_layout(model, recorder.copies) if share else None
        if pieces is None:
            return num_bytes, [(row[3], row[3], _num_bytes(row[1], row[2])) for row in tensors]
        self.penstock_regions, size, rows = pieces
        return size, rows

    def attach_segment(self, name: str, num_bytes: int) -> int:
        """Maps a segment. Returns its number."""
        payload = open_segment(SharedMemoryMedium(name=name, nonce=""), num_bytes).payload
        segment = torch.from_numpy(payload)
        if self.penstock_regions is None:
            pairs = [(copy.target, _like(copy.source, segment)) for copy in self.penstock_copies]
        else:
            pairs = [
                (region.parameter, _at(segment, region.offset, region.parameter))
                for region in self.penstock_regions
            ]
        self.penstock_switches.append(pairs)
        return len(self.penstock_switches) - 1

    def switch_weights(self, number: int) -> float:
        """Switches every tensor to what a segment holds. Returns the seconds that it took."""
        started = time.perf_counter()
        if self.penstock_regions is None:
            with torch.no_grad():
                for target, source in self.penstock_switches[number]:
                    target.copy_(source)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        else:
            for parameter, view in self.penstock_switches[number]:
                parameter.data = view
        return time.perf_counter() - started


class _CopyRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down every copy out of a checkpoint's bytes."""

    def __init__(self, checkpoint: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storage = checkpoint.untyped_storage().data_ptr()
        self.copies: list[Copy] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].untyped_storage().data_ptr() == self._storage:
            self.copies.append(Copy(target=args[0].detach(), source=args[1]))
        return func(*args, **(kwargs or {}))


def _check_coverage(model: nn.Module, copies: Sequence[Copy]) -> None:
    """Raises ValueError if a parameter would keep anything of before, or a copy goes elsewhere.

    What no copy reaches (the padding of a vocabulary) must be zero.
    """
    written = {copy.target.untyped_storage().data_ptr() for copy in copies}
    parameters = {each.untyped_storage().data_ptr(): name for name, each in model.named_parameters()}
    if not written <= parameters.keys():
        raise ValueError("loading a checkpoint copies to tensors that are no parameters")
    for name, parameter in model.named_parameters():
        if parameter.untyped_storage().data_ptr() not in written or torch.count_nonzero(parameter):
            raise ValueError(f"loading a checkpoint leaves {name} as it was, or computes it")


def _shared_layout(
    model: nn.Module, copies: Sequence[Copy]
) -> tuple[list[Region], int, list[PieceRow]] | None:
    """Places every parameter in a segment; None if a copy is not of bytes that lie together."""
    regions: dict[int, Region] = {}
    end = 0
    for parameter in model.parameters():
        if not parameter.is_cpu or not parameter.is_contiguous():
            return None
        regions[parameter.data_ptr()] = Region(parameter=parameter, offset=end)
        end += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    by_storage = {region.parameter.untyped_storage().data_ptr(): region for region in regions.values()}
    pieces = []
    for copy in copies:
        target, source = copy.target, copy.source
        if target.dtype != source.dtype or not (target.is_contiguous() and source.is_contiguous()):
            return None
        region = by_storage[target.untyped_storage().data_ptr()]
        start = region.offset + target.data_ptr() - region.parameter.data_ptr()
        pieces.append((int(source.storage_offset()) * source.itemsize, start, target.nbytes))
    return list(regions.values()), end, pieces


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return TORCH_DTYPES[dtype].itemsize * torch.Size(shape).numel()


def _view(checkpoint: Tensor, row: TensorRow) -> Tensor:
    _, dtype, shape, offset = row
    return checkpoint[offset : offset + _num_bytes(dtype, shape)].view(TORCH_DTYPES[dtype]).view(shape)


def _like(source: Tensor, segment: Tensor) -> Tensor:
    """The same elements of a segment that has the checkpoint's layout."""
    elements = segment[: segment.numel() // source.itemsize * source.itemsize].view(source.dtype)
    return elements.as_strided(source.shape, source.stride(), source.storage_offset())


def _at(segment: Tensor, offset: int, parameter: Tensor) -> Tensor:
    return segment[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
