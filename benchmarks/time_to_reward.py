"""Wall-clock from one warm-started policy to a reward: ours against TRL's GRPOTrainer.

The quickstart's task, policy, batch (8 groups of 16), learning rate and number of steps, GRPO
on both sides and no evaluation meanwhile, on the same cores: ours as a learner and one actor
(--actors) of one thread each, TRL as one process with as many threads as there are cores. TRL's
clock starts when its training does, ours when the actors have joined. Both end at the first step
at which the mean reward of five steps is there.

    OMP_NUM_THREADS=1 python benchmarks/time_to_reward.py [--seeds 3] [--json FILE]

Names: speedup_over_trl (median over the seeds), seconds and trl_seconds (medians), and the
least and the greatest speedup of a seed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.report import add_arguments, write
from harness.training_run import Laboratory, seconds_to

_TRL_SECONDS = 1800.0
_DEPTH = 2
"""Batches that may be under way: one is trained on while the next is generated."""
_SLOTS = 128 * _DEPTH
"""Of all actors: for all of those batches."""


async def ours(folder: Path, *, seed: int, num_steps: int, target: float, num_actors: int) -> float | None:
    async with Laboratory(folder, seed=seed) as laboratory:
        run = await laboratory.train(
            "ours",
            max_lag=4,
            num_steps=num_steps,
            num_actors=num_actors,
            num_slots=_SLOTS // num_actors,
            pipeline_depth=_DEPTH,
            algorithm='preset = "grpo"\n',
        )
    waits, steps = (sum(getattr(s, name) for s in run.steps) for name in ("wait_seconds", "step_seconds"))
    print(
        f"seed {seed} ours: {run.seconds:.1f} s for {num_steps} steps: learner {steps:.1f} s in steps, {waits:.1f} s "
        f"waiting; actors idle {run.actor_idle_share:.2f}; lag {run.lag_mean:.2f}",
        flush=True,
    )
    return run.seconds_to(target)


def trl(folder: Path, *, seed: int, num_steps: int, target: float) -> float | None:
    out, threads = folder / "trl.jsonl", len(os.sched_getaffinity(0))
    script = str(Path(__file__).parent / "harness" / "trl_grpo.py")
    options = ("--seed", str(seed), "--steps", str(num_steps), "--threads", str(threads))
    subprocess.run(
        [sys.executable, script, str(folder / "warm-started"), str(out), *options],
        check=True,
        timeout=_TRL_SECONDS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    print(f"seed {seed} TRL: {rows[-1]['seconds']:.1f} s for {len(rows)} steps", flush=True)
    return seconds_to(target, [row["seconds"] for row in rows], [row["reward"] for row in rows])


def measure(seed: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds to the target: (ours, TRL's)."""
    options = {"seed": seed, "num_steps": arguments.steps, "target": arguments.target}
    with tempfile.TemporaryDirectory() as name:
        first = asyncio.run(ours(Path(name), num_actors=arguments.actors, **options))
        second = trl(Path(name), **options)
    if first is None or second is None:
        raise SystemExit(
            f"reward {arguments.target} was not reached (ours {first}, TRL {second}): raise --steps"
        )
    print(f"seed {seed}: to {arguments.target} ours {first:.1f} s, TRL {second:.1f} s", flush=True)
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--target", type=float, default=0.9, help="mean reward of five steps")
    parser.add_argument("--actors", type=int, default=1, help="of ours, with 128 slots in all")
    add_arguments(parser)
    arguments = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("the peer, TRL, is not installed: pip install -e '.[dev]' -c constraints.txt")
    pairs = [measure(seed, arguments) for seed in range(arguments.seeds)]
    ratios = [theirs / mine for mine, theirs in pairs]
    results = {
        "speedup_over_trl": statistics.median(ratios),
        "speedup_least": min(ratios),
        "speedup_greatest": max(ratios),
        "seconds": statistics.median(mine for mine, _ in pairs),
        "trl_seconds": statistics.median(theirs for _, theirs in pairs),
    }
    write(results, arguments)


if __name__ == "__main__":
    main()
