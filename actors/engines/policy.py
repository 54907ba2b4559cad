"""A policy's architecture, from its folder: no weights needed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from actors.engines.slots import ATTENTION
from penstock.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Architecture:
    config: Any
    """transformers' PreTrainedConfig."""
    stop_ids: frozenset[int]
    """Tokens that end a turn."""
    vocab_size: int
    max_context: int
    """Positions that the policy was made for."""


def load_architecture(folder: Path) -> Architecture:
    """Reads config.json, generation_config.json and the tokeniser's settings. Raises ConfigError."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; expected a Hugging Face folder of a causal LM")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}/config.json cannot be used: {error}") from error
    text = config.get_text_config()
    try:
        vocab_size, max_context = text.vocab_size, text.max_position_embeddings
    except AttributeError as error:
        raise ConfigError(f"the torch engine cannot run this policy: {error}") from error
    return Architecture(
        config=config,
        # Some configurations name defaults of a larger vocabulary.
        stop_ids=frozenset(token for token in _stop_ids(folder, text) if token < vocab_size),
        vocab_size=vocab_size,
        max_context=max_context,
    )


def build_model(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The policy with tensors of no particular value, for slots' attention. Raises ConfigError."""
    try:
        with no_init_weights(), torch.device(device):
            model = AutoModelForCausalLM.from_config(
                architecture.config, attn_implementation=ATTENTION, dtype=dtype
            )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"the torch engine cannot run this policy: {error}") from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _stop_ids(folder: Path, config: Any) -> Iterable[int]:
    yield from _ids(config.eos_token_id)
    if (folder / "generation_config.json").is_file():
        yield from _ids(GenerationConfig.from_pretrained(folder).eos_token_id)
    yield from _tokenizer_stop_ids(folder)


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _tokenizer_stop_ids(folder: Path) -> list[int]:
    """The id of tokenizer_config.json's eos_token, looked up among tokenizer.json's added tokens."""
    settings, tokenizer = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not settings.is_file() or not tokenizer.is_file():
        return []
    try:
        token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
    except ValueError as error:
        raise ConfigError(f"{folder}: the tokeniser's files are not JSON: {error}") from error
    text = token["content"] if isinstance(token, dict) else token
    return [entry["id"] for entry in added if entry["content"] == text]
