"""What `penstock eval` writes: a table, a file of results, a file of answers."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.table import Table

from actors.evaluation.play import Played
from penstock.errors import ConfigError
from penstock.scores import MEAN, Score, mean_score, score


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """Of one policy, in every environment."""

    policy: str
    scores: Mapping[str, Score | None]
    """By environment, and their mean under "mean"; None where no episode came to a reward."""
    faults: Mapping[str, Mapping[str, int]]
    """By environment: episodes without a reward, by cause. They count in no mean."""

    @classmethod
    def of(
        cls,
        policy: str,
        environments: Sequence[str],
        played: Sequence[Played],
        *,
        pass_at: Sequence[int],
        threshold: float,
    ) -> PolicyResult:
        scores: dict[str, Score | None] = {}
        faults: dict[str, dict[str, int]] = {}
        for environment in environments:
            own = [each for each in played if each.question.task.environment == environment]
            answers = [each.answer for each in own if each.answer is not None]
            scores[environment] = score(answers, pass_at=pass_at, threshold=threshold)
            faults[environment] = dict(Counter(each.fault for each in own if each.answer is None))
        known = [found for found in scores.values() if found is not None]
        scores[MEAN] = mean_score(known) if len(known) == len(scores) else None
        return cls(policy=policy, scores=scores, faults=faults)

    @property
    def unanswered(self) -> Iterator[tuple[str, str]]:
        """Environments in which nothing came to a reward, and a fault of each."""
        for environment, faults in self.faults.items():
            if self.scores[environment] is None:
                yield environment, next(iter(faults), "no episode was played")


class Answers:
    """A file of answers, or none. Raises ConfigError if it cannot be written."""

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        try:
            self._file = None if path is None else path.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"out {path} cannot be written: {error}") from error

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, policy: str, played: Played) -> None:
        if self._file is None:
            return
        task, answer = played.question.task, played.answer
        line = {
            "policy": policy,
            "environment": task.environment,
            "split": task.split,
            "index": task.index,
            "seed": task.seed,
            "sample": played.question.sample,
            "reward": None if answer is None else answer.reward,
            "num_tokens": None if answer is None else answer.num_tokens,
            "truncated": None if answer is None else answer.truncated,
            "fault": played.fault or None,
            "prompt": played.prompt,
            "answer": played.text,
            "metrics": dict(played.metrics or {}),
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()


def to_json(results: Sequence[PolicyResult], settings: Mapping[str, object]) -> str:
    policies = [
        {
            "policy": result.policy,
            "scores": {
                name: None if found is None else dataclasses.asdict(found)
                for name, found in result.scores.items()
            },
            "faults": result.faults,
        }
        for result in results
    ]
    return json.dumps({**settings, "policies": policies}, indent=2) + "\n"


def table(results: Sequence[PolicyResult], pass_at: Sequence[int], title: str) -> Table:
    """A row for each policy and environment; with several environments also their mean."""
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    several = len(results) > 1
    names = ["policy"] if several else []
    for name in (*names, "environment"):
        shown.add_column(name, overflow="fold", min_width=8)
    passes = [f"pass@{k}" for k in pass_at]
    for name in ("prompts", "answers", "reward", "±", *passes, "cut", "tokens", "faults"):
        shown.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for result in results:
        rows = [name for name in result.scores if name != MEAN or len(result.scores) > 2]
        for name in rows:
            faults = result.faults.values() if name == MEAN else (result.faults[name],)
            num_faults = sum(sum(of_one.values()) for of_one in faults)
            cells = _cells(result.scores[name], pass_at)
            shown.add_row(
                *([result.policy] if several else []),
                name,
                *cells,
                str(num_faults),
                end_section=name == rows[-1],
            )
    return shown


def _cells(found: Score | None, pass_at: Sequence[int]) -> list[str]:
    if found is None:
        return ["0", "0", *["-"] * (4 + len(pass_at))]
    return [
        str(found.num_prompts),
        str(found.num_answers),
        f"{found.reward_mean:.3f}",
        _known(found.reward_error),
        *(_known(found.pass_at[k]) for k in pass_at),
        f"{found.truncated_share:.1%}",
        f"{found.tokens_mean:.1f}",
    ]


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
