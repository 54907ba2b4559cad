"""What lag does to learning: plain PPO ratios against a correction for lag, at several bounds.

The quickstart's task, policy, batch, learning rate and number of steps; for each seed and
each bound on lag once with

    grpo            ratios against the policy that sampled, clipped; no correction
    decoupled_ppo   ratios against the policy at the start of the step; what sampled earlier
                    is weighted by a truncated importance weight

The pipeline is as deep as the bound allows, so that fast actors hold lag near it.

    OMP_NUM_THREADS=1 python benchmarks/lag.py [--seeds 3] [--json FILE] [--plot FILE.png]

Prints a table of medians and ranges over the seeds. Names, for a preset P and a bound L:
reward_P_L (mean of the last ten steps), steps_P_L (to the target; mean of five steps),
lag_P_L (mean over the steps of what was trained).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from harness.report import add_arguments, write
from harness.training_run import Laboratory, Run, seconds_to
from matplotlib.figure import Figure

from penstock.quickstart.settings import ALGORITHM
from penstock.quickstart.summary import smoothed

ALGORITHMS = {"grpo": 'preset = "grpo"\n', "decoupled_ppo": ALGORITHM}
COLORS = {"grpo": "tab:orange", "decoupled_ppo": "tab:blue"}
LAST_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One run, by step."""

    rewards: Sequence[float]
    lag_mean: float
    lag_max: float

    @property
    def final_reward(self) -> float:
        return statistics.fmean(self.rewards[-LAST_STEPS:])

    def steps_to(self, target: float) -> float:
        """Infinite if it was not reached."""
        steps = list(range(1, len(self.rewards) + 1))
        found = seconds_to(target, [float(step) for step in steps], self.rewards)
        return math.inf if found is None else found


def curve(run: Run) -> Curve:
    return Curve(
        rewards=[step.reward for step in run.steps],
        lag_mean=run.lag_mean,
        lag_max=max(step.lag_max for step in run.steps),
    )


Curves = dict[tuple[str, int], list[Curve]]


async def train_all(folder: Path, seed: int, arguments: argparse.Namespace, curves: Curves) -> None:
    async with Laboratory(folder, seed=seed) as laboratory:
        for max_lag in arguments.lags:
            for preset, algorithm in ALGORITHMS.items():
                run = await laboratory.train(
                    f"{preset}-{max_lag}",
                    max_lag=max_lag,
                    num_steps=arguments.steps,
                    pipeline_depth=max_lag + 1,
                    algorithm=algorithm,
                )
                found = curve(run)
                curves[preset, max_lag].append(found)
                print(
                    f"seed {seed} {preset} max_lag {max_lag}: reward {found.final_reward:.3f}, "
                    f"{arguments.target} after {found.steps_to(arguments.target):.0f} steps, "
                    f"lag {found.lag_mean:.2f} (max {found.lag_max:.0f}), {run.seconds:.0f} s",
                    flush=True,
                )


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the range if there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(curves: Curves, target: float) -> str:
    """In Markdown."""
    lines = [
        f"| preset | max_lag | lag trained | reward of the last {LAST_STEPS} steps | steps to {target} |",
        "|---|---|---|---|---|",
    ]
    for (preset, max_lag), runs in sorted(
        curves.items(), key=lambda item: (item[0][0] != "grpo", item[0][1])
    ):
        lags = spread([run.lag_mean for run in runs], 2)
        rewards = spread([run.final_reward for run in runs], 3)
        steps = spread([run.steps_to(target) for run in runs], 0)
        lines.append(f"| `{preset}` | {max_lag} | {lags} | {rewards} | {steps} |")
    return "\n".join(lines)


def draw(curves: Curves, path: Path, lags: Sequence[int]) -> None:
    """Writes a PNG: a panel a bound, the seeds' rewards by step, and their median."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(2.6 * len(lags), 3), dpi=150, layout="constrained")
        for axes, max_lag in zip(
            figure.subplots(1, len(lags), sharey=True, squeeze=False)[0], lags, strict=True
        ):
            for preset, color in COLORS.items():
                runs = [smoothed(run.rewards, span=5) for run in curves[preset, max_lag]]
                for rewards in runs:
                    axes.plot(range(1, len(rewards) + 1), rewards, color=color, alpha=0.25, linewidth=0.8)
                medians = [statistics.median(step) for step in zip(*runs, strict=True)]
                axes.plot(range(1, len(medians) + 1), medians, color=color, linewidth=1.8, label=preset)
            axes.set_title(f"max_lag {max_lag}")
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("reward, mean of 5 steps")
        figure.axes[-1].legend(loc="lower right", frameon=False)
        figure.savefig(path)


def results(curves: Curves, target: float) -> dict[str, float]:
    found = {}
    for (preset, max_lag), runs in curves.items():
        suffix = f"{preset}_{max_lag}"
        found[f"reward_{suffix}"] = statistics.median(run.final_reward for run in runs)
        found[f"steps_{suffix}"] = statistics.median(run.steps_to(target) for run in runs)
        found[f"lag_{suffix}"] = statistics.median(run.lag_mean for run in runs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 4, 8])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--plot", type=Path, help="write a picture of the curves to this PNG file")
    add_arguments(parser)
    arguments = parser.parse_args()
    curves: Curves = defaultdict(list)
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(train_all(Path(folder), seed, arguments, curves))
    print(table(curves, arguments.target))
    if arguments.plot is not None:
        draw(curves, arguments.plot, arguments.lags)
    write(results(curves, arguments.target), arguments)


if __name__ == "__main__":
    main()
