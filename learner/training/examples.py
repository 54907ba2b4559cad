"""Prompt and completion pairs from a JSONL file, as token sequences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from learner.training.packing import TokenSequence
from penstock.errors import ConfigError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises ConfigError, also for a tokeniser without an end token: completions could not end."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: the tokeniser cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{folder}: the tokeniser has no eos_token, which ends every completion")
    return tokenizer


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[TokenSequence]:
    """Reads {"prompt": ..., "completion": ...} lines; only the completion and its end token are learned from.

    A prompt is taken as it is, without a chat template. Blank lines are passed over.
    Raises ConfigError, naming file and line.
    """
    examples = [_encode(tokenizer, where, pair, max_tokens) for where, pair in _pairs(path)]
    if not examples:
        raise ConfigError(f"{path}: has no examples; expected one JSON object a line")
    return examples


def _pairs(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _parse(f"{path}, line {number}", line)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; expected JSONL with a prompt and a completion a line"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _parse(where: str, line: str) -> dict[str, str]:
    try:
        pair: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(pair, dict):
        raise ConfigError(f"{where}: is a JSON {type(pair).__name__}; expected an object")
    for key in ("prompt", "completion"):
        if not isinstance(pair.get(key), str):
            raise ConfigError(f'{where}: "{key}" is {pair.get(key)!r}; expected a string')
    return pair


def _encode(
    tokenizer: PreTrainedTokenizerBase, where: str, pair: dict[str, str], max_tokens: int
) -> TokenSequence:
    prompt: Sequence[int] = tokenizer(pair["prompt"])["input_ids"]
    completion: Sequence[int] = tokenizer(pair["completion"], add_special_tokens=False)["input_ids"]
    token_ids = [*prompt, *completion, tokenizer.eos_token_id]
    if len(token_ids) > max_tokens:
        raise ConfigError(f"{where}: has {len(token_ids)} tokens; the policy's context holds {max_tokens}")
    loss_mask = np.zeros(len(token_ids), dtype=np.uint8)
    loss_mask[len(prompt) :] = 1
    return TokenSequence(token_ids=np.asarray(token_ids, dtype=np.int32), loss_mask=loss_mask)
