"""What the quickstart's policy learns: to spell words of five letters backward.

The warm start imitates a careless teacher, who copies the word in six of ten
demonstrations. So the policy can spell backward, but does it less than half of the
time, and reinforcement has something to find that no demonstration rate can show.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path

from environments.reasoning_gym import ReasoningGym
from penstock.trajectory import Task

ENVIRONMENT = "reasoning_gym:spell_backward"
CHARACTERS = string.ascii_letters + "="

NUM_TRAIN = 6000
NUM_EVAL = 512
SHARE_RIGHT = 0.4

_NAME = "spell_backward"
_LENGTH = {"min_word_len": 5, "max_word_len": 5}
_PROMPT = "{word}="


def serve_arguments(*, seed: int, bind: str) -> list[str]:
    """The arguments of `penstock` that serve the task."""
    lengths = [f"{key}={value}" for key, value in _LENGTH.items()]
    sizes = ["--num-train", str(NUM_TRAIN), "--num-eval", str(NUM_EVAL)]
    return [
        *("env", "serve", ENVIRONMENT),
        *("--prompt", _PROMPT, "--config", *lengths, *sizes, "--seed", str(seed), "--bind", bind),
    ]


def environment(*, seed: int) -> ReasoningGym:
    """What `serve_arguments` serves, in this process."""
    return ReasoningGym(
        name=_NAME,
        config=_LENGTH,
        num_train=NUM_TRAIN,
        num_eval=NUM_EVAL,
        seed=seed,
        prompt=_PROMPT,
        answer="whole",
    )


def training_prompts(*, seed: int) -> list[str]:
    """The prompts of the environment's training tasks, as `word=`: none of those it holds out."""
    words = environment(seed=seed)
    tasks = (Task(ENVIRONMENT, "train", index, seed) for index in range(NUM_TRAIN))
    return [words.prompt(task)[0].content for task in tasks]


def write_demonstrations(path: Path, prompts: Sequence[str], *, count: int, seed: int) -> None:
    """Writes JSONL for `penstock train sft`: the word backward in four of ten lines, else a copy of it."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt = chance.choice(prompts)
            word = prompt.removesuffix("=")
            completion = word[::-1] if chance.random() < SHARE_RIGHT else word
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
