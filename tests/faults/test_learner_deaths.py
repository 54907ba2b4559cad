"""The coordinator and the trainer die at any moment: the run ends as an undisturbed one does."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from .bench import RESTART_FLEET, Bench, FaultLength
from .scripted_actor import Script, fixed

STEADY = Script(num_tokens=fixed(5), token_seconds=0.01)


def schedule_of(bench: Bench) -> list[tuple[int, int, int]]:
    """(step, group, slot) of everything trained."""
    return bench.rows(
        "SELECT step, group_id, slot FROM trajectories WHERE state = 'trained' ORDER BY 1, 2, 3"
    )


async def undisturbed(folder: Path, num_steps: int) -> list[tuple[int, int, int]]:
    async with Bench(folder, num_steps=num_steps, max_lag=0, fleet=RESTART_FLEET) as bench:
        await bench.start()
        bench.actor("a1")
        await bench.trained()
        return schedule_of(bench)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "victim",
    [
        pytest.param("coordinator", marks=pytest.mark.slow),
        pytest.param("trainer", marks=pytest.mark.slow),
        "both",
    ],
)
async def test_whoever_dies_the_run_trains_what_an_undisturbed_one_does(
    tmp_path: Path, victim: str, fault_length: FaultLength
):
    num_kills = fault_length.of(short=3, long=200)
    num_steps = 4 * num_kills + 4
    rng = random.Random(victim)
    expected = await undisturbed(tmp_path / "undisturbed", num_steps)
    async with Bench(tmp_path, num_steps=num_steps, max_lag=0, fleet=RESTART_FLEET) as bench:
        await bench.start(step_seconds=0.1)
        bench.actor("a1", script=STEADY)
        for number in range(1, num_kills + 1):
            await bench.reached(4 * number - 1)
            await asyncio.sleep(rng.uniform(0.0, 0.2))
            await kill(bench, victim)
        await bench.trained()
        bench.check()
        assert schedule_of(bench) == expected


async def kill(bench: Bench, victim: str) -> None:
    """And start it again, as their supervisor does."""
    assert bench.coordinator is not None
    assert bench.trainer is not None
    if victim != "trainer":
        bench.coordinator.kill()
        await bench.start_coordinator()
    if victim != "coordinator":
        bench.trainer.kill()
        bench.start_trainer(step_seconds=0.1)
