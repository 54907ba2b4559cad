"""Writes a policy as a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from learner.training.config import Precision
from learner.training.model import quiet_transformers
from penstock.errors import ConfigError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
_LARGEST_FILE = "5GB"


def check_output_folder(out: Path) -> None:
    """Refuses to overwrite what is not a policy. Raises ConfigError; call it before the work."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; expected a folder to write the policy to")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ConfigError(f"{out}: exists and is not a policy folder; name another, or an empty one")


def write_policy_folder(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    source: Path,
    precision: Precision,
    architecture: Any = AutoModelForCausalLM,
    **settings: int,
) -> None:
    """Writes weights under their checkpoint names, and all other files as `source` has them.

    tensors: full, by the names of the model's parameters and persistent buffers; tied
    ones once. architecture: transformers' class of what is written. settings: changed in
    its config.json. The folder is written aside and renamed; a policy folder that stands at
    `out` is replaced. Raises ConfigError.
    """
    check_output_folder(out)
    dtype = torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.writing-{os.getpid()}")
    shutil.copytree(source, aside, ignore=shutil.ignore_patterns(*_WEIGHTS, ".*"))
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, dtype=dtype, **settings)
        with torch.device("meta"):
            causal_lm = architecture.from_config(config)
        weights = {name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}
        report = causal_lm.load_state_dict(weights, strict=False, assign=True)
        causal_lm.tie_weights()
        lacking = [name for name, parameter in causal_lm.named_parameters() if parameter.is_meta]
        if lacking or report.unexpected_keys:
            raise ConfigError(
                f"these weights are not of {source}: {len(lacking)} tensors are missing and "
                f"{len(report.unexpected_keys)} unknown, such as {(lacking + report.unexpected_keys)[0]}"
            )
        with quiet_transformers():
            causal_lm.save_pretrained(aside, max_shard_size=_LARGEST_FILE)
        _replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(aside: Path, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    aside.rename(out)
