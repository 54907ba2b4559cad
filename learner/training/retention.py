"""Which checkpoints stay: the newest, to go on from, and the best by a metric, to export."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.coordinator.evaluation.log import FILE_NAME
from learner.coordinator.evaluation.result import EvaluationResult
from learner.training.config import EVALUATION, CheckpointConfig, Mode
from penstock.trajectory import PolicyVersion

MANIFEST = "manifest.json"
PREFIX = "step-"

Results = Mapping[PolicyVersion | str, EvaluationResult]
"""By version, and by the digest of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    keep: int
    """The newest so many stay."""
    keep_best: int = 0
    """And so many of all, by their `metric`."""
    metric: str = "reward_mean"
    mode: Mode = Mode.MAX
    evaluations: Path | None = None
    """The run's results, where the metric is one of them."""

    @staticmethod
    def of(config: CheckpointConfig, run_dir: Path) -> Retention:
        return Retention(
            keep=config.keep,
            keep_best=config.keep_best,
            metric=config.metric,
            mode=config.mode,
            evaluations=run_dir / FILE_NAME if config.metric.startswith(EVALUATION) else None,
        )

    def stale(self, newest_first: Sequence[Path]) -> list[Path]:
        """The checkpoints that may go. While one's evaluation may still come, it stays."""
        if not self.keep_best:
            return list(newest_first[self.keep :])
        results = self._results()
        best = self._ranked(newest_first, results)[: self.keep_best]
        newest = max((result.version for result in results.values()), default=PolicyVersion(0, 0))
        last_step = max((result.version.step for result in results.values()), default=-1)
        return [
            path
            for path in newest_first[self.keep :]
            if path not in best
            and not (self.evaluations and (step_of(path) > last_step or _version_of(path) > newest))
        ]

    def best_first(self, paths: Iterable[Path]) -> list[Path]:
        """Those that have the metric; of equal ones the newer first."""
        return self._ranked(paths, self._results())

    def _ranked(self, paths: Iterable[Path], results: Results) -> list[Path]:
        sign = -1.0 if self.mode is Mode.MAX else 1.0
        values = {path: self._value(path, results) for path in sorted(paths, reverse=True)}
        ranked = [(sign * value, path) for path, value in values.items() if value is not None]
        return [path for _, path in sorted(ranked, key=lambda each: each[0])]

    def _value(self, path: Path, results: Results) -> float | None:
        if self.evaluations is None:
            return metrics_of(path).get(self.metric)
        # A trainer that goes on from the checkpoint publishes its weights once more, under another epoch.
        result = results.get(_fields(path).get("weights", "")) or results.get(_version_of(path))
        return None if result is None else result.measure(self.metric.removeprefix(EVALUATION))

    def _results(self) -> Results:
        """A line that is torn, as by a crash, is none."""
        results: dict[PolicyVersion | str, EvaluationResult] = {}
        if self.evaluations is None or not self.evaluations.exists():
            return results
        for line in self.evaluations.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                result = EvaluationResult.from_json(line)
                results[result.version] = results[result.digest] = result
        return results


def metrics_of(path: Path) -> dict[str, float]:
    """What a checkpoint says of its steps; nothing for one that is older than metrics, or damaged."""
    metrics: dict[str, float] = _fields(path).get("metrics", {})
    return metrics


def step_of(path: Path) -> int:
    """Of a checkpoint's folder."""
    return int(path.name.removeprefix(PREFIX))


def _version_of(path: Path) -> PolicyVersion:
    return PolicyVersion(_fields(path).get("epoch", 0), step_of(path))


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return fields


class Means:
    """Each metric's mean over the steps since the checkpoint before. What is not finite does not count."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """Those so far; then it begins anew."""
        taken = {name: math.fsum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return taken
