"""Wall clocks that are wrong, or jump: leases, lags and order do not depend on them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .bench import CHECKOUT, Bench

HOUR = 3600.0


def clock(folder: Path, offset_seconds: float) -> dict[str, str]:
    """The environment of a process whose wall clock is off."""
    path = folder / "clock"
    path.write_text(str(offset_seconds))
    skewed = CHECKOUT / "tests" / "faults" / "skewed"
    return {
        "PYTHONPATH": os.pathsep.join([str(skewed), str(CHECKOUT)]),
        "PENSTOCK_TEST_CLOCK": str(path),
    }


@pytest.mark.parametrize("offset_seconds", [HOUR, -HOUR])
@pytest.mark.parametrize("who", ["learner", "actor"])
async def test_a_clock_that_is_an_hour_off_changes_nothing(tmp_path: Path, who: str, offset_seconds: float):
    environ = clock(tmp_path, offset_seconds)
    async with Bench(tmp_path, num_steps=4) as bench:
        await bench.start_coordinator(**(environ if who == "learner" else {}))
        bench.start_trainer()
        actor = bench.actor_process("a1", **(environ if who == "actor" else {}))
        await bench.trained()
        assert await actor.end() == 0
        bench.check()
        assert {outcome for (outcome,) in bench.rows("SELECT outcome FROM leases")} == {"filled"}
        if who == "learner":
            true_time = (tmp_path / "clock").stat().st_mtime
            ((written_at,),) = bench.rows("SELECT min(time) FROM events")
            assert abs(written_at - true_time - offset_seconds) < HOUR / 2, "the clock was off indeed"


async def test_a_clock_that_jumps_in_mid_run_ends_no_lease(tmp_path: Path):
    environ = clock(tmp_path, 0.0)
    async with Bench(tmp_path, num_steps=8) as bench:
        await bench.start_coordinator(**environ)
        bench.start_trainer(step_seconds=0.1)
        actor = bench.actor_process("a1", **environ)
        for step, offset_seconds in ((2, 10.0), (4, -10.0), (6, HOUR)):
            await bench.reached(step)
            clock(tmp_path, offset_seconds)
        await bench.trained()
        assert await actor.end() == 0
        bench.check()
        assert {outcome for (outcome,) in bench.rows("SELECT outcome FROM leases")} == {"filled"}
