"""What a run came to: summary.json and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from penstock.errors import PenstockError
from penstock.v1 import operator_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    accuracy_before: float
    """Share of held-out words spelled backward by the warm-started policy, sampled at temperature 1."""
    accuracy_after: float
    versions: int
    """Published after the one that training started from."""
    max_lag: int
    max_lag_trained: int
    ledger_imbalance: int
    trajectories: Mapping[str, int]
    """By verdict and fate."""
    mixed_version_trajectories: int
    """Trained, and made by more than one version."""
    seconds: float
    """Of the whole quickstart."""
    training_seconds: float
    tokens_per_second: float
    """Sampled tokens that were trained on, by second of training."""
    seed: int
    engine: str
    """As the actors named it when they joined."""
    num_actors: int
    killed_actor: bool

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def trajectories_by_verdict(ledger: pb.LedgerStatus) -> dict[str, int]:
    return {
        "accepted": ledger.accepted,
        "trained": ledger.trained,
        "pending": ledger.pending,
        "stale": ledger.stale,
        "surplus": ledger.surplus,
        "group_dropped": ledger.group_dropped,
        "quarantined": ledger.quarantined,
        "duplicate": ledger.duplicates,
        "rejected": sum(ledger.rejected.values()),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One training step."""

    step: int
    """Of the version that it made."""
    seconds: float
    """Since the first step."""
    reward: float
    lag_mean: float
    lag_max: float


def read_points(path: Path) -> list[Point]:
    """Reads the trainer's metrics.jsonl. Raises PenstockError."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            Point(
                step=line["step"],
                seconds=line["time"] - lines[0]["time"],
                reward=line["reward_mean"],
                lag_mean=line["lag_mean"],
                lag_max=line["lag_max"],
            )
            for line in lines
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PenstockError(
            f"{path}: expected the trainer's metrics, a JSON object a line: {error!r}"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One version, on held-out tasks."""

    step: int
    reward: float
    error: float


def read_evaluations(path: Path) -> list[Evaluated]:
    """Reads the run's evaluations.jsonl, as far as there are answers. Raises PenstockError."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        means = [(line, line["scores"]["mean"]) for line in lines]
        return [
            Evaluated(step=line["step"], reward=mean["reward_mean"], error=mean["reward_error"] or 0.0)
            for line, mean in means
            if mean is not None
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PenstockError(
            f"{path}: expected the run's evaluations, a JSON object a line: {error!r}"
        ) from error


def draw(
    points: Sequence[Point],
    path: Path,
    *,
    max_lag: int,
    killed_at: float | None = None,
    evaluated: Sequence[Evaluated] = (),
) -> None:
    """Writes a PNG: reward above, lag below, over the seconds of training; versions stand where they were made."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _draw_reward(above, points)
        _draw_evaluations(above, points, evaluated)
        _draw_lag(below, points, max_lag)
        if killed_at is not None:
            for axes in (above, below):
                axes.axvline(killed_at, color="tab:red", linestyle=":", linewidth=1)
            above.annotate(
                " an actor is killed", (killed_at, 0.02), color="tab:red", xycoords=("data", "axes fraction")
            )
        figure.savefig(path)


def _draw_reward(axes: Axes, points: Sequence[Point]) -> None:
    seconds = [point.seconds for point in points]
    rewards = [point.reward for point in points]
    axes.plot(seconds, rewards, color="tab:blue", alpha=0.3, linewidth=1, label="reward of each step")
    axes.plot(seconds, smoothed(rewards, span=9), color="tab:blue", linewidth=2, label="mean of 9 steps")
    axes.set_ylabel("reward")
    axes.set_ylim(min(0.0, *rewards), max(1.02, *rewards))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)


def _draw_evaluations(axes: Axes, points: Sequence[Point], evaluated: Sequence[Evaluated]) -> None:
    made_at = {point.step: point.seconds for point in points}
    if evaluated:
        axes.errorbar(
            [made_at.get(each.step, 0.0) for each in evaluated],
            [each.reward for each in evaluated],
            yerr=[each.error for each in evaluated],
            color="tab:red",
            marker="o",
            markersize=4,
            linestyle="none",
            capsize=2,
            label="held-out tasks, by version",
        )
        axes.legend(loc="lower right", frameon=False)


def _draw_lag(axes: Axes, points: Sequence[Point], max_lag: int) -> None:
    seconds = [point.seconds for point in points]
    axes.step(
        seconds,
        [point.lag_max for point in points],
        color="tab:orange",
        linewidth=1,
        where="mid",
        label="max",
    )
    axes.plot(seconds, [point.lag_mean for point in points], color="tab:green", linewidth=1.5, label="mean")
    axes.axhline(max_lag, color="black", linestyle="--", linewidth=1, label="bound")
    axes.set_ylabel("lag (versions)")
    axes.set_xlabel("seconds since the first step")
    axes.set_ylim(-0.2, max_lag + 0.6)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", ncols=3, frameon=False, bbox_to_anchor=(1.0, 1.25))


def smoothed(values: Sequence[float], *, span: int) -> list[float]:
    """The mean of each value and its neighbours, `span` in all, fewer at the ends."""
    reach = span // 2
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]
