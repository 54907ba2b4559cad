"""Writes adapters as a folder that peft, and what reads peft's, loads onto the policy that they were trained on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from learner.training.adapters import Adapters, layer_names, peft_names, require_peft
from learner.training.config import Precision
from penstock.errors import ConfigError

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def check_adapter_folder(out: Path) -> None:
    """Refuses to overwrite what holds no adapters. Raises ConfigError; call it before the work."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; expected a folder to write the adapters to")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise ConfigError(f"{out}: exists and holds no adapters; name another folder, or an empty one")


def write_adapter_folder(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    adapters: Adapters,
    *,
    source: Path,
    precision: Precision,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors. Raises ConfigError.

    tensors: full, by the names that training has for them. Among them may be the head of a reward
    model, which is trained whole. source: the policy that the adapters belong to.
    """
    check_adapter_folder(out)
    dtype = torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32
    weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in peft_names(tensors).items()}
    heads = sorted({name.rpartition(".")[0] for name in tensors if ".lora_" not in name})
    settings = require_peft().LoraConfig(
        task_type="SEQ_CLS" if heads else "CAUSAL_LM",
        base_model_name_or_path=str(source.absolute()),
        r=adapters.rank,
        lora_alpha=adapters.scale * adapters.rank,
        target_modules=layer_names(tensors),
        modules_to_save=heads or None,
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    aside = out.with_name(f".{out.name}.writing-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        settings.save_pretrained(aside)
        save_file(weights, aside / _WEIGHTS, metadata={"format": "pt"})
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
