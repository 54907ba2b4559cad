"""Questions and answers from a JSONL file, graded as mathematics by math-verify.

One object a line, with a question and an answer; of an answer such as GSM8K's, with
its reasoning, what stands after the last `####` counts. math-verify's own deadlines are
switched off, for they turn a slow comparison into a wrong answer: the worker is killed
instead, and the reward says so.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import math_verify

from environments.base import Description, Message, StepResult
from environments.digest import settings_digest
from environments.prompts import PromptTemplate
from environments.splits import is_held_out
from penstock.errors import ConfigError
from penstock.trajectory import Reward, Task

_MAX_GRADED_CHARACTERS = 4096
"""Of an answer, its end is graded."""
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What sympy raises for expressions that it cannot compare."""

# Its warning that there are no deadlines; see above.
logging.getLogger("math_verify").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    gold: str
    """The final answer."""


class QuestionAnswer:
    """A file of questions: 1 for an answer that equals the file's, else 0."""

    def __init__(
        self,
        *,
        path: str,
        question_key: str,
        answer_key: str,
        eval_fraction: float,
        eval_path: str,
        prompt: str,
    ) -> None:
        questions = list(_distinct(read_questions(Path(path), question_key, answer_key)))
        if eval_path:
            held_out = list(_distinct(read_questions(Path(eval_path), question_key, answer_key)))
            texts = {question.text for question in held_out}
            splits = {
                "train": [question for question in questions if question.text not in texts],
                "eval": held_out,
            }
        else:
            splits = _divide(questions, eval_fraction)
        self._splits = {split: chosen for split, chosen in splits.items() if chosen}
        self._prompt = PromptTemplate(prompt, {"question": ""})
        version = importlib.metadata.version("math-verify")
        settings = {"math_verify": version, "prompt": prompt, "contents": _contents_digest(self._splits)}
        self._description = Description(
            name=f"question_answer:{Path(path).stem}",
            version=version,
            digest=settings_digest(settings),
            splits={split: len(chosen) for split, chosen in self._splits.items()},
        )

    def describe(self) -> Description:
        return self._description

    def prompt(self, task: Task) -> tuple[Message, ...]:
        question = self._splits[task.split][task.index]
        return (Message(role="user", content=self._prompt.render({"question": question.text})),)

    def score(self, task: Task, action: str) -> StepResult:
        correct = is_correct(self._splits[task.split][task.index].gold, action)
        return StepResult(done=True, reward=Reward.valid(1.0 if correct else 0.0))


def is_correct(gold: str, answer: str) -> bool:
    """True if the answer's final expression equals the gold one.

    It is taken from what follows the last `####`, or else from where math-verify
    expects it: in \\boxed{}, after "the answer is", at the end. May take for ever.
    """
    final = answer.rpartition("####")[2][-_MAX_GRADED_CHARACTERS:]
    try:
        found = _parse(final)
        return bool(found) and bool(
            math_verify.verify(
                _parse(_as_mathematics(gold)), found, timeout_seconds=None, raise_on_error=True
            )
        )
    except _UNREADABLE:
        return False


def read_questions(path: Path, question_key: str, answer_key: str) -> Iterator[Question]:
    """Raises ConfigError that names the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not any(line.strip() for line in lines):
        raise ConfigError(f"{path} is empty; expected one JSON object a line")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _read_line(line, f"{path}, line {number}", question_key, answer_key)


def _read_line(line: str, where: str, question_key: str, answer_key: str) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: holds a {type(row).__name__}; expected an object")
    answer = row.get(answer_key)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    for key, value in ((question_key, row.get(question_key)), (answer_key, answer)):
        if key not in row:
            raise ConfigError(f"{where}: has no {key!r}; it has {', '.join(sorted(row)) or 'no keys'}")
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{where}: {key!r} is {row[key]!r}; expected text")
    return Question(row[question_key], _final_answer(str(answer), where))


def _final_answer(answer: str, where: str) -> str:
    gold = answer.rpartition("####")[2].strip()
    if not _NUMBER.fullmatch(gold) and not (gold and _parse(_as_mathematics(gold))):
        raise ConfigError(
            f"{where}: {answer[-80:]!r} has no final answer; expected mathematics, or `#### 18` at its end"
        )
    return gold


def _as_mathematics(gold: str) -> str:
    """So that math-verify reads it whole, whatever it holds."""
    return gold if _NUMBER.fullmatch(gold) or "\\boxed" in gold else f"\\boxed{{{gold.strip('$')}}}"


def _parse(text: str) -> list[Any]:
    parsed: list[Any] = math_verify.parse(text, parsing_timeout=None, raise_on_error=True)
    return parsed


def _distinct(questions: Iterator[Question]) -> Iterator[Question]:
    """Each text once, with the answer that came first."""
    seen: set[str] = set()
    for question in questions:
        if question.text not in seen:
            seen.add(question.text)
            yield question


def _divide(questions: list[Question], eval_fraction: float) -> dict[str, list[Question]]:
    splits: dict[str, list[Question]] = {"train": [], "eval": []}
    for question in questions:
        held_out = is_held_out(question.text, fraction=eval_fraction)
        splits["eval" if held_out else "train"].append(question)
    return splits


def _contents_digest(splits: dict[str, list[Question]]) -> str:
    state = hashlib.sha256()
    for split, questions in sorted(splits.items()):
        for question in questions:
            state.update(json.dumps([split, question.text, question.gold]).encode())
    return state.hexdigest()
