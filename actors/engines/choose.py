"""Which engine an actor generates with, and how it is made."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import torch

from actors.engines.base import Engine
from actors.engines.torch import TorchEngine
from actors.engines.vllm import VllmEngine
from penstock.errors import ConfigError

EngineName = Literal["torch", "vllm"]
EngineChoice = Literal["auto", "torch", "vllm"]


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
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "auto":
        return "vllm" if installed and device.startswith("cuda") else "torch"
    if wanted == "vllm" and not installed:
        raise ConfigError(
            "engine is 'vllm', which is not installed; `pip install 'penstock[vllm]'` installs it for GPUs, "
            "`make setup-vllm` for CPUs"
        )
    return wanted


def make_engine(
    name: EngineName,
    policy: Path,
    *,
    device: str,
    num_slots: int,
    max_context: int | None = None,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> Engine:
    """Raises ConfigError."""
    if name == "vllm":
        return VllmEngine(
            policy,
            device=device,
            num_slots=num_slots,
            max_context=max_context,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
        )
    if tensor_parallel_size * pipeline_parallel_size != 1:
        raise ConfigError("the torch engine computes on one device; use the vllm engine for several")
    return TorchEngine(policy, num_slots=num_slots, max_context=max_context, device=device)
