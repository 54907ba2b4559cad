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
        check_steps(bench)


def check_steps(bench: Bench) -> None:
    """Groups were trained in order, as in a run that nothing disturbs."""
    steps = bench.rows("SELECT step, group_id FROM groups WHERE state = 'trained' ORDER BY step, group_id")
    per_step = bench.schedule.groups_per_step
    num_groups = bench.schedule.num_steps * per_step
    assert steps == [(group // per_step, group) for group in range(num_groups)]


def lose_newest_checkpoint(folder: Path) -> int:
    """Returns the step of the one before it."""
    *_, before, newest = sorted(folder.glob("checkpoint-*.json"))
    newest.unlink()
    return int(before.stem.rpartition("-")[2])


async def test_without_its_newest_checkpoint_a_trainer_starts_from_the_one_before_and_the_ledger_says_so(
    tmp_path: Path,
):
    async with Bench(tmp_path, num_steps=8, max_lag=0) as bench:
        await bench.start(step_seconds=0.05)
        bench.actor("a1")
        await until(lambda: published(bench) >= 5, "step 5")
        assert bench.trainer is not None
        bench.trainer.kill()
        before = lose_newest_checkpoint(tmp_path)
        bench.start_trainer()
        await bench.trained()
        assert bench.rows("SELECT step FROM lineages") == [(0,), (before,)]
        assert "is damaged or gone" in bench.events("fallback")[0]
        assert not audit(bench.run_dir / "ledger.sqlite").violations
        check_steps(bench)
