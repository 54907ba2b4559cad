"""Policies that are built without memory, so that each rank reads only its own part of the weights.

The model is made on torch's meta device, divided and sharded there, and then each rank reads
its part of one tensor after another from the memory-mapped files, as float32 masters.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from learner.training.adapters import base_name, first_values
from learner.training.blocks import Block, block_of
from learner.training.tensor_parallel import FAMILIES
from penstock.errors import ConfigError

_log = logging.getLogger(__name__)

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class WeightFiles:
    """The safetensors of a policy folder, memory-mapped: only what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError."""
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for path in _weight_paths(folder):
                file = self._stack.enter_context(safe_open(path, "pt"))
                self._files |= dict.fromkeys(file.keys(), file)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            self.close()
            raise ConfigError(f"{folder}: the weights cannot be loaded: {error}") from error

    def close(self) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None for a tensor that isn't there."""
        file = self._files.get(name)
        return None if file is None else tuple(file.get_slice(name).get_shape())

    def block(self, name: str, block: Block) -> torch.Tensor:
        """A part of a tensor, in the file's dtype."""
        part: torch.Tensor = self._files[name].get_slice(name)[block]
        return part


def _weight_paths(folder: Path) -> Iterable[Path]:
    index = folder / _INDEX
    if not index.is_file():
        return [folder / _SINGLE]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def build_empty(folder: Path, config: Any) -> Any | None:
    """The model on the meta device, its buffers on the CPU. None, with a line in the log, where it must be loaded
    whole."""
    reason = ""
    if config.model_type not in FAMILIES:
        reason = f"policies of type {config.model_type} are"
    elif getattr(config, "quantization_config", None) is not None:
        reason = "quantised weights are"
    if not reason:
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        rotary = causal_lm.base_model.rotary_emb
        causal_lm.base_model.rotary_emb = type(rotary)(config=config)
        if misfit := _misfit(folder, causal_lm):
            reason = f"a folder whose {misfit} is"
    if reason:
        _log.info("%s: %s loaded whole by each rank, which needs memory for all weights", folder, reason)
        return None
    return causal_lm


def _misfit(folder: Path, causal_lm: nn.Module) -> str:
    """Which weight is not in the files as the model has it. Loading the folder whole says more of it, or mends it."""
    files = WeightFiles(folder)
    try:
        for name, parameter in causal_lm.named_parameters():
            if files.shape(name) != tuple(parameter.shape):
                return f"{name} is not as config.json says"
    finally:
        files.close()
    return ""


def fill(model: nn.Module, folder: Path, *, rank: int, device: torch.device, seed: int) -> None:
    """Reads this rank's part of each parameter that is on the meta device. No collective. Raises ConfigError.

    seed: of the first values of adapters, as in add_adapters.
    """
    files = WeightFiles(folder)
    filled: dict[int, nn.Parameter] = {}
    state: dict[str, nn.Parameter] = {}
    try:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.is_meta:
                if id(parameter) not in filled:
                    filled[id(parameter)] = _filled(files, name, parameter, rank, device, seed)
                # Tied parameters stay one.
                state[name] = filled[id(parameter)]
    finally:
        files.close()
    model.load_state_dict(state, strict=False, assign=True)


def _filled(
    files: WeightFiles, name: str, parameter: nn.Parameter, rank: int, device: torch.device, seed: int
) -> nn.Parameter:
    from learner.training.parallel import local

    name = name.removeprefix("causal_lm.")
    block = block_of(parameter, rank)
    values = first_values(name, tuple(parameter.shape), seed=seed)
    values = files.block(base_name(name), block) if values is None else values[block]
    if not bool(torch.isfinite(values).all()):
        raise ConfigError(f"{files.folder}: {name} has values that are not finite; its weights are unusable")
    empty = torch.empty_like(parameter.detach(), device=device)
    local(empty).copy_(values)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
