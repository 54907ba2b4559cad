"""What the offline algorithms learn from: examples and preference pairs, from JSONL or Parquet."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from learner.training.conversations import Encoder
from learner.training.packing import TokenSequence
from learner.training.preference import Pair
from learner.training.records import Record, read_records
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
    """Reads {"prompt", "completion"} or {"messages"} a row.

    Of a prompt and a completion, each text or messages, only the completion is learned
    from; of a conversation, every turn of the assistant. Raises ConfigError, naming file and line.
    """
    encoder = Encoder(tokenizer, max_tokens=max_tokens)
    return [_example(encoder, where, record) for where, record in read_records(path)]


def read_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[Pair]:
    """Reads {"prompt", "chosen", "rejected"} a row, each text or messages, and an optional number "margin".

    Without a prompt, chosen and rejected are whole conversations, and what they begin with
    in common is the prompt. Raises ConfigError, naming file and line.
    """
    encoder = Encoder(tokenizer, max_tokens=max_tokens)
    return [_pair(encoder, where, record) for where, record in read_records(path)]


def _example(encoder: Encoder, where: str, record: Record) -> TokenSequence:
    if "messages" in record:
        return encoder.conversation(where, record["messages"])
    _require(where, record, "prompt", "completion")
    return encoder.completion(where, record["prompt"], record["completion"])


def _pair(encoder: Encoder, where: str, record: Record) -> Pair:
    if record.get("prompt") is None and isinstance(record.get("chosen"), list):
        record = _split_prompt(where, record)
    _require(where, record, "prompt", "chosen", "rejected")
    if record["chosen"] == record["rejected"]:
        raise ConfigError(f"{where}: chosen and rejected are the same; expected two answers")
    margin = record.get("margin")
    if margin is not None and (not isinstance(margin, int | float) or not math.isfinite(margin)):
        raise ConfigError(f'{where}: "margin" is {margin!r}; expected a finite number')
    return Pair(
        chosen=encoder.completion(where, record["prompt"], record["chosen"]),
        rejected=encoder.completion(where, record["prompt"], record["rejected"]),
        margin=float(margin or 0.0),
    )


def _split_prompt(where: str, record: Record) -> Record:
    chosen, rejected = record["chosen"], record.get("rejected")
    if not isinstance(rejected, list):
        raise ConfigError(f'{where}: "rejected" is {rejected!r}; expected messages, as "chosen" is')
    same = [left == right for left, right in zip(chosen, rejected, strict=False)]
    common = [*same, False].index(False)
    if common in (0, len(chosen), len(rejected)):
        raise ConfigError(f"{where}: chosen and rejected begin with no common prompt, or are nothing but it")
    return {**record, "prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _require(where: str, record: Record, prompt: str, *answers: str) -> None:
    """Raises ConfigError unless all are text, or all are messages."""
    kind = list if isinstance(record.get(prompt), list) else str
    for key in (prompt, *answers):
        if not isinstance(record.get(key), kind):
            expected = "a string" if kind is str else f"messages, as {prompt} is"
            raise ConfigError(f'{where}: "{key}" is {record.get(key)!r}; expected {expected}')
