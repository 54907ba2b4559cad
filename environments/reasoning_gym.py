"""Any task of the reasoning-gym library (https://github.com/open-thought/reasoning-gym), strictly scored.

Items come from distant seeds, since the library's item i of seed s is item 0 of seed
s + i. Each question is kept once, and is a training or a held-out question by a hash of
its text alone: no number of tasks, seed or restart moves a question across. An answer
earns 1 if the library's own score is exactly 1, else 0: partial credit is soon gamed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.metadata
import itertools
import math
import numbers
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy
from reasoning_gym.factory import DATASETS

from environments.base import Description, Message, StepResult
from environments.digest import settings_digest
from environments.prompts import PromptTemplate
from environments.splits import is_held_out
from penstock.errors import ConfigError, EnvironmentFault, FaultKind
from penstock.trajectory import Reward, Task

REFUSED = {
    "binary_matrix": "its scorer runs the answer as Python (eval)",
    "composite": "it is a mixture; serve each of its tasks by its own name",
    "countdown": "its scorer runs the answer as Python (sympy.parse_expr)",
    "intermediate_integration": "its scorer runs the answer as Python (sympy.parse_expr)",
    "n_queens": "its scorer runs the answer as Python (eval)",
    "polynomial_multiplication": "its scorer runs the answer as Python (sympy.parse_expr)",
    "puzzle24": "its scorer runs the answer as Python (sympy.parse_expr)",
    "simple_integration": "its scorer runs the answer as Python (sympy.parse_expr)",
    "spiral_matrix": "its scorer runs the answer as Python (eval)",
    "string_insertion": "its scorer runs the answer as Python (eval)",
}
"""Tasks that are not served, and why."""

DEFAULT_PROMPTS = {
    "whole": "{question}",
    "tags": "{question}\n\nWrite your final answer between <answer> and </answer>.",
}

_HELD_OUT_FRACTION = 0.2
_ITEMS_A_SEED = 1000
_PATIENCE = 1000
_NONSENSE = "neither a right answer nor a wrong one"
_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NAN = re.compile(r"(?<![a-z])nan(?![a-hk-z])", re.IGNORECASE)
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What the library's scorers raise for answers that they cannot read."""


class Item(NamedTuple):
    """One entry of the library, and the dataset that made it and scores answers to it."""

    entry: dict[str, Any]
    dataset: Any

    @property
    def question(self) -> str:
        return str(self.entry["question"])

    @property
    def values(self) -> dict[str, object]:
        """What a prompt may hold."""
        return {**self.entry["metadata"], "question": self.question}


class ReasoningGym:
    """One task of the library: a question, an answer, 1 or 0."""

    def __init__(
        self,
        *,
        name: str,
        config: Mapping[str, Any],
        num_train: int,
        num_eval: int,
        seed: int,
        prompt: str,
        answer: str,
    ) -> None:
        make_dataset = dataset_maker(name, config)
        prompt = prompt or DEFAULT_PROMPTS[answer]
        first = next(_items(make_dataset, name, seed))
        self._name = name
        self._prompt = PromptTemplate(prompt, first.values)
        self._extract = _inside_tags if answer == "tags" else str.strip
        _refuse_broken_scorer(name, first)
        self._splits = self._build(_items(make_dataset, name, seed), {"train": num_train, "eval": num_eval})
        version = importlib.metadata.version("reasoning_gym")
        settings = {"name": name, "version": version, "config": dict(config), "seed": seed, "prompt": prompt}
        settings |= {"answer": answer, "num_train": num_train, "num_eval": num_eval}
        self._description = Description(
            name=f"reasoning_gym:{name}",
            version=version,
            digest=settings_digest(settings),
            splits={split: len(items) for split, items in self._splits.items()},
        )

    def describe(self) -> Description:
        return self._description

    def prompt(self, task: Task) -> tuple[Message, ...]:
        item = self._splits[task.split][task.index]
        return (Message(role="user", content=self._prompt.render(item.values)),)

    def score(self, task: Task, action: str) -> StepResult:
        answer = self._extract(action)
        correct = answer is not None and is_correct(self._splits[task.split][task.index], answer)
        return StepResult(
            done=True,
            reward=Reward.valid(1.0 if correct else 0.0),
            metrics={"answered": 0.0 if answer is None else 1.0},
        )

    def _build(self, items: Iterator[Item], sizes: Mapping[str, int]) -> dict[str, list[Item]]:
        """Draws until both splits are full. Raises ConfigError when no new questions come."""
        splits: dict[str, list[Item]] = {split: [] for split, size in sizes.items() if size > 0}
        seen: set[str] = set()
        num_repeated = 0
        while any(len(chosen) < sizes[split] for split, chosen in splits.items()):
            item = next(items)
            # By prompt as well, for it may leave out what tells two questions apart.
            texts = {item.question, self._prompt.render(item.values)}
            if texts & seen:
                num_repeated += 1
                if num_repeated > _PATIENCE + 4 * len(seen):
                    raise ConfigError(self._too_few(splits, sizes))
                continue
            num_repeated = 0
            seen |= texts
            split = "eval" if is_held_out(item.question, fraction=_HELD_OUT_FRACTION) else "train"
            if len(splits.get(split, ())) < sizes[split]:
                splits[split].append(item)
        return splits

    def _too_few(self, splits: Mapping[str, list[Item]], sizes: Mapping[str, int]) -> str:
        found = " and ".join(f"{len(items)} of {sizes[split]} for {split}" for split, items in splits.items())
        return (
            f"reasoning_gym:{self._name} has too few distinct questions: found {found}, one in five being held "
            "out; lower --num-train and --num-eval, or widen the task with --config"
        )


def dataset_maker(name: str, config: Mapping[str, Any]) -> Callable[[int], Any]:
    """From a seed to the library's dataset. Raises ConfigError for an unknown or refused task or key."""
    if name in REFUSED:
        raise ConfigError(f"reasoning_gym:{name} is not served: {REFUSED[name]}")
    if name not in DATASETS:
        raise ConfigError(f"reasoning-gym has no task {name!r}{_nearest(name, DATASETS)}")
    make, config_type = DATASETS[name]
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    overrides = {key: _override(name, fields, key, value) for key, value in config.items()}

    def from_seed(seed: int) -> Any:
        try:
            return make(config=config_type(**overrides, seed=seed, size=_ITEMS_A_SEED))
        except (AssertionError, ValueError, TypeError) as error:
            raise ConfigError(f"reasoning_gym:{name} refuses the config {dict(config)}: {error}") from error

    return from_seed


def is_correct(item: Item, answer: str) -> bool:
    """True if the library gives the answer exactly 1. Raises EnvironmentFault if it cannot score at all.

    An exception of the library's scorer means that it could not read the answer, if it
    can read the item's own. "nan" compares as equal to anything in some scorers, so it
    is right only where the item's own answer says it.
    """
    gold = str(item.entry["answer"])
    if _says_nan(answer) and not _says_nan(gold):
        return False
    try:
        score = item.dataset.score_answer(answer, item.entry)
    except _UNREADABLE as error:
        if answer == gold.strip() or (
            item.entry["answer"] is not None and not is_correct(item, gold.strip())
        ):
            raise EnvironmentFault(
                f"the scorer cannot read the task's own answer {gold!r}: {error!r}", kind=FaultKind.DATA
            ) from error
        return False
    if not isinstance(score, numbers.Real) or not math.isfinite(score):
        raise EnvironmentFault(f"the scorer gave {score!r}; expected a finite number", kind=FaultKind.DATA)
    return score == 1


def _refuse_broken_scorer(name: str, item: Item) -> None:
    """A scorer must give its own answer the full score, where there is one, and nonsense less."""
    gold = item.entry["answer"]
    if gold is not None and not is_correct(item, str(gold).strip()):
        raise ConfigError(f"reasoning_gym:{name} is not served: it gives its own answer {gold!r} less than 1")
    if is_correct(item, _NONSENSE):
        raise ConfigError(f"reasoning_gym:{name} is not served: its scorer takes any text for a right answer")


def _override(name: str, fields: Mapping[str, dataclasses.Field[Any]], key: str, value: Any) -> Any:
    """The value as the library's config wants it. Raises ConfigError."""
    if key in ("seed", "size"):
        raise ConfigError(f"--config.{key} cannot be set: use --seed, --num-train and --num-eval")
    if key not in fields:
        near = _nearest(key, [known for known in fields if known not in ("seed", "size")])
        raise ConfigError(f"reasoning_gym:{name} has no setting {key!r}{near}")
    field = fields[key]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, tuple | list) and isinstance(value, list):
        return type(default)(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, bool | int | float | str) and type(value) is not type(default):
        wanted = f"{type(default).__name__}, such as {default!r}"
        raise ConfigError(f"--config.{key} of reasoning_gym:{name} is {value!r}; expected {wanted}")
    return value


def _items(make_dataset: Callable[[int], Any], name: str, seed: int) -> Iterator[Item]:
    """Endless; equal for equal arguments, in every process."""
    for block in itertools.count():
        block_seed = _distant_seed(name, seed, block)
        dataset = make_dataset(block_seed)
        for index in range(_ITEMS_A_SEED):
            # A few tasks draw from the global generators.
            random.seed(block_seed + index)
            numpy.random.seed(block_seed + index)
            yield Item(dataset[index], dataset)


def _distant_seed(name: str, seed: int, block: int) -> int:
    """31 bits, spread out, so that blocks of nearby seeds don't overlap."""
    digest = hashlib.sha256(f"penstock.reasoning_gym.v1 {name} {seed} {block}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _inside_tags(action: str) -> str | None:
    """The text in the last pair of tags; None if there is none."""
    found = _TAGS.findall(action)
    return str(found[-1]).strip() if found else None


def _says_nan(text: str) -> bool:
    return _NAN.search("".join(text.split())) is not None


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(sorted(known))}"
