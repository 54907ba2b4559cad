"""What an evaluation came to: a line of evaluations.jsonl, and what operators see."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from learner.coordinator.evaluation.records import EvaluationState
from penstock.errors import ConfigError
from penstock.scores import MEAN, Score
from penstock.trajectory import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    number: int
    version: PolicyVersion
    digest: str
    state: EvaluationState
    """complete, or deadline."""
    num_slots: int
    num_answers: int
    num_missing: int
    """Not answered by the deadline."""
    faults: Mapping[str, int]
    """Slots that were given up, by cause. They have no reward, and count in no mean."""
    seconds: float
    """From its opening to its end; after a restart of the coordinator, from there."""
    time: float
    """Of its end, in seconds since 1970."""
    scores: Mapping[str, Score | None]
    """By environment, and their mean under "mean". None where there is no answer."""

    @property
    def mean(self) -> Score | None:
        return self.scores.get(MEAN)

    def measure(self, name: str) -> float | None:
        """[ENVIRONMENT/]reward_mean or [ENVIRONMENT/]pass@K, by default of the mean; None if it has no such number.

        Raises ConfigError for an environment that was not evaluated.
        """
        environment, _, measure = name.rpartition("/")
        if (environment or MEAN) not in self.scores:
            raise ConfigError(
                f"training.checkpoint.metric names environment {environment!r}, which is not evaluated; expected one "
                f"of {', '.join(sorted(self.scores))}"
            )
        score = self.scores[environment or MEAN]
        if score is None:
            return None
        if measure == "reward_mean":
            return score.reward_mean
        return score.pass_at.get(pass_k(measure))

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        fields["version"] = str(self.version)
        return json.dumps({**fields, "epoch": self.version.epoch, "step": self.version.step})

    @classmethod
    def from_json(cls, text: str) -> EvaluationResult:
        fields = json.loads(text)
        fields["version"] = PolicyVersion(fields.pop("epoch"), fields.pop("step"))
        fields["state"] = EvaluationState(fields["state"])
        fields["scores"] = {name: _score(found) for name, found in fields["scores"].items()}
        return cls(**fields)

    def describe(self) -> str:
        """For people, on one line."""
        mean = self.mean
        reward = "no answer" if mean is None else f"reward {mean.reward_mean:.3f}"
        if mean is not None:
            if mean.reward_error is not None:
                reward += f" ± {mean.reward_error:.3f}"
            chances = ", ".join(f"pass@{k} {c:.3f}" for k, c in mean.pass_at.items() if c is not None)
            reward += f", {chances}" if chances else ""
        lost = f", {sum(self.faults.values())} given up after faults" if self.faults else ""
        missing = f", {self.num_missing} missing at the deadline" if self.num_missing else ""
        return (
            f"version {self.version}: {reward}; {self.num_answers} of {self.num_slots} answers{lost}{missing}"
        )


def pass_k(measure: str) -> int:
    """The K of pass@K; 0 for another measure."""
    k = measure.removeprefix("pass@")
    return int(k) if k != measure and k.isdecimal() else 0


def _score(fields: dict[str, Any] | None) -> Score | None:
    if fields is None:
        return None
    for name in ("pass_at", "pass_prompts"):
        fields[name] = {int(k): value for k, value in fields[name].items()}
    return Score(**fields)
