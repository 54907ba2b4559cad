"""A reward model as an environment: prompts from a file, and answers scored in batches.

The model is what `penstock train rm` writes, or any sequence classifier of one label that
transformers loads. It reads a prompt and an answer tokenised as in its training, and its
number is the reward.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from environments.base import Description, Message, StepResult
from environments.digest import settings_digest
from environments.splits import is_held_out
from learner.training.conversations import Encoder, messages
from learner.training.examples import load_tokenizer
from learner.training.model import quiet_transformers, weights_digest
from learner.training.packing import TokenSequence
from learner.training.records import read_records
from penstock.errors import ConfigError
from penstock.trajectory import Reward, RewardStatus, Task

Prompt = str | list[dict[str, str]]


class RewardModel:
    """Scores an answer to a prompt of a file by a sequence classifier of one label."""

    def __init__(
        self,
        *,
        path: str,
        prompts: str,
        prompt_key: str,
        eval_fraction: float,
        device: str,
        dtype: str,
        batch_tokens: int,
    ) -> None:
        folder = Path(path)
        self._model = load_reward_model(folder, device=device, dtype=dtype)
        context: int | None = getattr(self._model.config, "max_position_embeddings", None)
        self._tokenizer = load_tokenizer(folder)
        self._encoder = Encoder(self._tokenizer, max_tokens=context or 2**31)
        self._batch_tokens = batch_tokens
        self._splits = _divide(read_prompts(Path(prompts), prompt_key), eval_fraction)
        settings = {
            "transformers": transformers.__version__,
            "weights": weights_digest(folder),
            "dtype": dtype,
            "prompts": hashlib.sha256(json.dumps(self._splits, sort_keys=True).encode()).hexdigest(),
        }
        self._description = Description(
            name=f"reward_model:{folder.resolve().name}",
            version=transformers.__version__,
            digest=settings_digest(settings),
            splits={split: len(chosen) for split, chosen in self._splits.items()},
        )

    def describe(self) -> Description:
        return self._description

    def prompt(self, task: Task) -> tuple[Message, ...]:
        prompt = self._splits[task.split][task.index]
        if isinstance(prompt, str):
            return (Message(role="user", content=prompt),)
        return tuple(Message(role=turn["role"], content=turn["content"]) for turn in prompt)

    def score_batch(self, answers: Sequence[tuple[Task, str]]) -> list[StepResult]:
        """One result an answer. What the model's context cannot hold is unscorable."""
        results: dict[int, StepResult] = {}
        rows: dict[int, TokenSequence] = {}
        for number, (task, action) in enumerate(answers):
            try:
                rows[number] = self._encode(self._splits[task.split][task.index], action)
            except ConfigError as error:
                reward = Reward(status=RewardStatus.UNSCORABLE, message=str(error))
                results[number] = StepResult(done=True, reward=reward)
        for numbers in _batches(rows, self._batch_tokens):
            values = score_rows(self._model, [rows[number] for number in numbers])
            for number, value in zip(numbers, values, strict=True):
                results[number] = StepResult(done=True, reward=_reward(value))
        return [results[number] for number in range(len(answers))]

    def _encode(self, prompt: Prompt, action: str) -> TokenSequence:
        answer = action if isinstance(prompt, str) else [{"role": "assistant", "content": action}]
        return self._encoder.completion("the answer", prompt, answer)


def load_reward_model(folder: Path, *, device: str, dtype: str) -> Any:
    """Raises ConfigError."""
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        model = model.to(where).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{folder}: no sequence classifier can be loaded: {error}") from error
    if report["missing_keys"]:
        raise ConfigError(
            f"{folder}: the weights lack {sorted(report['missing_keys'])[0]}; expected a reward model, such as "
            "`penstock train rm` writes"
        )
    if model.config.num_labels != 1:
        raise ConfigError(f"{folder}: the model has {model.config.num_labels} labels; expected 1, the reward")
    return model


def score_rows(model: Any, rows: Sequence[TokenSequence]) -> list[float]:
    """The model's number for each row, which is padded on the right: [N] floats.

    transformers reads a decoder's number off the last token that isn't the padding token of its
    configuration. So what pads here is a token that no row ends with.
    """
    ends = {int(row.token_ids[-1]) for row in rows}
    padding = next(token for token in range(len(ends) + 1) if token not in ends)
    longest = max(row.num_tokens for row in rows)
    token_ids_NL = np.full((len(rows), longest), padding, dtype=np.int64)
    mask_NL = np.zeros((len(rows), longest), dtype=np.int64)
    for number, row in enumerate(rows):
        token_ids_NL[number, : row.num_tokens] = row.token_ids
        mask_NL[number, : row.num_tokens] = 1
    model.config.pad_token_id = padding
    with torch.inference_mode():
        logits_N1 = model(
            input_ids=torch.from_numpy(token_ids_NL).to(model.device),
            attention_mask=torch.from_numpy(mask_NL).to(model.device),
        ).logits
    found: list[float] = logits_N1.squeeze(-1).float().tolist()
    return found


def read_prompts(path: Path, key: str) -> Iterator[Prompt]:
    """Each prompt of a JSONL or Parquet file once, text or messages. Raises ConfigError that names file and line."""
    seen: set[str] = set()
    for where, record in read_records(path):
        if key not in record:
            raise ConfigError(f"{where}: has no {key!r}; it has {', '.join(sorted(record)) or 'no keys'}")
        value = record[key]
        prompt: Prompt = value if isinstance(value, str) else messages(where, key, value)
        if not prompt:
            raise ConfigError(f"{where}: {key!r} is empty; expected text or a list of messages")
        if (text := json.dumps(prompt)) not in seen:
            seen.add(text)
            yield prompt


def _divide(prompts: Iterator[Prompt], eval_fraction: float) -> dict[str, list[Prompt]]:
    splits: dict[str, list[Prompt]] = {"train": [], "eval": []}
    for prompt in prompts:
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        splits["eval" if is_held_out(text, fraction=eval_fraction) else "train"].append(prompt)
    return {split: chosen for split, chosen in splits.items() if chosen}


def _batches(rows: dict[int, TokenSequence], batch_tokens: int) -> Iterator[list[int]]:
    """The rows' numbers, those of similar lengths together, up to a number of padded tokens."""
    batch: list[int] = []
    for number in sorted(rows, key=lambda number: rows[number].num_tokens):
        if batch and (len(batch) + 1) * rows[number].num_tokens > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _reward(value: float) -> Reward:
    if math.isfinite(value):
        return Reward.valid(value)
    return Reward(status=RewardStatus.UNSCORABLE, message=f"the reward model gives {value}")
