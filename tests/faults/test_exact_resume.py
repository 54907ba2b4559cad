"""A learner that dies at random trains the same groups in the same steps as one that does not."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from pathlib import Path

from learner.coordinator.audit import audit

from .bench import Bench, until


def published(bench: Bench) -> int:
    """The newest step that the trainer published, without asking a coordinator that may be away."""
    journal = bench.folder / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return max((line["step"] for line in lines if line["op"] == "publish"), default=-1)


async def test_a_run_whose_learner_dies_at_random_has_the_same_steps(tmp_path: Path):
    """Real coordinator, trainer and actor; one of the learner's two is killed again and again.

    max_lag 0, since with more room the order in which groups complete has a say.
    """
    chance = random.Random(1)
    async with Bench(tmp_path, num_steps=10, max_lag=0) as bench:
        await bench.start(step_seconds=0.05)
        bench.actor("a1")
        assert bench.trainer is not None
        for deaths in range(4):
            await until(lambda at=2 * deaths + 1: published(bench) >= at, f"step {2 * deaths + 1}")
            await asyncio.sleep(chance.uniform(0, 0.2))
            if deaths % 2:
                bench.trainer.send(signal.SIGKILL)
                await bench.trainer.end()
                bench.start_trainer(step_seconds=0.05)
            else:
                assert bench.coordinator is not None
                bench.coordinator.send(signal.SIGKILL)
                await bench.coordinator.end()
                await bench.start_coordinator()
        await bench.trained()
        assert not audit(bench.run_dir / "ledger.sqlite").violations
        steps = bench.rows(
            "SELECT step, group_id FROM groups WHERE state = 'trained' ORDER BY step, group_id"
        )
        per_step = bench.schedule.groups_per_step
        assert steps == [(group // per_step, group) for group in range(10 * per_step)]
