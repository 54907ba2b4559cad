"""What overlapping generation with training is worth, and what it costs where it can gain nothing.

The same code, policy, seeds and number of steps, once with `max_lag` 4 and once with
`max_lag` 0, which waits for every group of a step before it trains:

    slow       an environment whose steps take 50 to 2,000 ms, with a heavy tail: there is
               idle time to fill
    control    an environment that answers at once, and every process pinned to one core:
               there is nothing to fill, so asynchrony can only cost

One actor generates, with slots for the two batches that may be under way: a second actor's
process would take its own share of that one core. The control's runs are short, so it
has more seeds.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py [--seeds N] [--control-seeds N] [--json FILE]

Names: async_over_sync and negative_control (seconds to the same reward with max_lag 0,
divided by those with max_lag 4; medians over the seeds), and of the slow asynchronous
runs: wasted_share (accepted trajectories that were not trained), learner_wait_share
(of the run's time), actor_idle_share (observations of an engine without work), lag_mean.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.report import add_arguments, write
from harness.training_run import Laboratory, Run

_ASYNC_LAG = 4
_DEPTH = 2
"""Batches that may be under way with it: one is trained on while the next is generated."""
_SLOTS = 128 * _DEPTH
"""Of the actor: for all of those batches."""


async def compare(folder: Path, *, seed: int, num_steps: int, slow: bool) -> tuple[Run, Run]:
    """(asynchronous, synchronous) runs of one seed."""
    async with Laboratory(folder, seed=seed) as laboratory:
        served = await laboratory.slow_environment() if slow else ""
        runs = [
            await laboratory.train(
                f"lag-{lag}",
                max_lag=lag,
                num_steps=num_steps,
                environment=served,
                num_actors=1,
                num_slots=_SLOTS,
                pipeline_depth=min(_DEPTH, lag + 1),
            )
            for lag in (_ASYNC_LAG, 0)
        ]
    return runs[0], runs[1]


def ratio(pairs: Sequence[tuple[Run, Run]], target: float) -> float:
    """Median over the seeds of synchronous over asynchronous seconds to the target reward."""
    ratios = []
    for asynchronous, synchronous in pairs:
        ours, theirs = asynchronous.seconds_to(target), synchronous.seconds_to(target)
        if ours is None or theirs is None:
            raise SystemExit(
                f"a run did not reach reward {target} (lag {_ASYNC_LAG}: {ours}, lag 0: {theirs}): raise --steps"
            )
        ratios.append(theirs / ours)
    return statistics.median(ratios)


def verdict(runs: Sequence[Run]) -> str:
    """The bottleneck of the asynchronous runs, in a word."""
    waits = statistics.median(run.learner_wait_share for run in runs)
    idle = statistics.median(run.actor_idle_share for run in runs)
    if waits < 0.1:
        return "learner"
    return "environment" if idle > 0.5 else "generation"


def measure(arguments: argparse.Namespace, *, seeds: int, slow: bool) -> list[tuple[Run, Run]]:
    pairs = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            work = compare(Path(folder), seed=seed, num_steps=arguments.steps, slow=slow)
            pairs.append(asyncio.run(work))
        for name, run in zip(("lag 4", "lag 0"), pairs[-1], strict=True):
            reached = run.seconds_to(arguments.target)
            print(
                f"{'slow' if slow else 'control'} seed {seed} {name}: {run.seconds:.1f} s for {len(run.steps)} steps, "
                f"{arguments.target} at {reached and round(reached, 1)} s, learner waits {run.learner_wait_share:.2f}, "
                f"actors idle {run.actor_idle_share:.2f}, lag {run.lag_mean:.2f}, wasted {run.wasted_share:.4f}",
                flush=True,
            )
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="of the slow environment")
    parser.add_argument("--control-seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--target", type=float, default=0.9, help="mean reward of five steps")
    add_arguments(parser)
    arguments = parser.parse_args()
    slow = measure(arguments, seeds=arguments.seeds, slow=True)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    control = measure(arguments, seeds=arguments.control_seeds, slow=False)
    os.sched_setaffinity(0, cores)
    runs = [asynchronous for asynchronous, _ in slow]
    print(f"bottleneck: {verdict(runs)}")
    results = {
        "async_over_sync": ratio(slow, arguments.target),
        "negative_control": ratio(control, arguments.target),
        "wasted_share": statistics.median(run.wasted_share for run in runs),
        "learner_wait_share": statistics.median(run.learner_wait_share for run in runs),
        "actor_idle_share": statistics.median(run.actor_idle_share for run in runs),
        "lag_mean": statistics.median(run.lag_mean for run in runs),
    }
    write(results, arguments)


if __name__ == "__main__":
    main()
