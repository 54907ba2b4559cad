"""Which checkpoints stay: the newest, to go on from, and the best by a metric, to export."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.training.config import CheckpointConfig, Mode

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    keep: int
    """The newest so many stay."""
    keep_best: int = 0
    """And so many of all, by their `metric`."""
    metric: str = "reward_mean"
    mode: Mode = Mode.MAX

    @staticmethod
    def of(config: CheckpointConfig) -> Retention:
        return Retention(keep=config.keep, keep_best=config.keep_best, metric=config.metric, mode=config.mode)

    def stale(self, newest_first: Sequence[Path]) -> list[Path]:
        """The checkpoints that may go."""
        best = self.best_first(newest_first)[: self.keep_best] if self.keep_best else []
        return [path for path in newest_first[self.keep :] if path not in best]

    def best_first(self, paths: Iterable[Path]) -> list[Path]:
        """Those that have the metric; of equal ones the newer first."""
        sign = -1.0 if self.mode is Mode.MAX else 1.0
        values = {path: metrics_of(path).get(self.metric) for path in sorted(paths, reverse=True)}
        ranked = [(sign * value, path) for path, value in values.items() if value is not None]
        return [path for _, path in sorted(ranked, key=lambda each: each[0])]


def metrics_of(path: Path) -> dict[str, float]:
    """What a checkpoint says of its steps; nothing for one that is older than metrics, or damaged."""
    try:
        metrics: dict[str, float] = json.loads((path / MANIFEST).read_bytes()).get("metrics", {})
    except (OSError, ValueError):
        return {}
    return metrics


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
