"""The engines by name, and whether one can be had. Imports no torch."""

from __future__ import annotations

import importlib.util
from typing import Literal

from penstock.errors import ConfigError

EngineName = Literal["torch", "vllm"]
EngineChoice = Literal["auto", "torch", "vllm"]


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def require_engine(name: EngineChoice) -> None:
    """Raises ConfigError for an engine that is not installed."""
    if name == "vllm" and not has_vllm():
        raise ConfigError(
            "engine is 'vllm', which is not installed; `pip install 'penstock[vllm]'` installs it for GPUs, "
            "`make setup-vllm` for CPUs"
        )
