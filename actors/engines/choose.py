"""Which engine an actor generates with, and how it is made."""

from __future__ import annotations

from pathlib import Path

import torch

from actors.engines.base import Engine
from actors.engines.names import EngineChoice, EngineName, has_vllm, require_engine
from actors.engines.torch import TorchEngine
from actors.engines.vllm import VllmEngine
from penstock.errors import ConfigError
from penstock.trajectory import InstallMode


def choose_device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device is {wanted!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {wanted!r}, but this process sees no CUDA device")
    return wanted


def choose_engine(wanted: EngineChoice, device: str) -> EngineName:
    """auto is vllm where it is installed and computes on a GPU. Raises ConfigError."""
    if wanted == "auto":
        return "vllm" if has_vllm() and device.startswith("cuda") else "torch"
    require_engine(wanted)
    return wanted


def make_engine(
    name: EngineName,
    policy: Path,
    *,
    device: str,
    num_slots: int,
    max_context: int | None = None,
    install_mode: InstallMode = InstallMode.KEEP,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int = 1,
) -> Engine:
    """Raises ConfigError."""
    if name == "vllm":
        return VllmEngine(
            policy,
            device=device,
            num_slots=num_slots,
            max_context=max_context,
            install_mode=install_mode,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            data_parallel_size=data_parallel_size,
        )
    if tensor_parallel_size * pipeline_parallel_size * data_parallel_size != 1:
        raise ConfigError("the torch engine computes on one device; use the vllm engine for several")
    return TorchEngine(
        policy, num_slots=num_slots, max_context=max_context, device=device, install_mode=install_mode
    )
