"""Environments that hang, slow down, die or answer garbage: the others of the run go on as if they were alone.

Two real servers with workers of their own; actors whose rollouts ask them over gRPC.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from learner.config import BreakerConfig

from ..integration.environment_servers import serving
from .bench import PATIENT_FLEET, Bench, until
from .scripted_actor import Script

HERE = Path(__file__).parents[1] / "integration"
FLEET = dataclasses.replace(PATIENT_FLEET, infrastructure_budget=100, data_budget=100)
QUICK_BREAKER = BreakerConfig(slow_seconds=1.0, probe_seconds=0.5)
SOUND_STEPS, OUTAGE_STEPS = 10, 30
ENDLESS = 1_000_000


@contextlib.asynccontextmanager
async def two_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, str]]:
    """One that behaves, and one that does what `order` says."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    async with (
        serving("toy_environments:Letters", workers=1) as letters,
        serving("toy_environments:Turncoat", {"order": str(tmp_path / "order")}, workers=4) as turncoat,
    ):
        yield letters, turncoat


def trained(bench: Bench, environment: str) -> int:
    """Groups."""
    sql = f"SELECT count(*) FROM groups WHERE state = 'trained' AND environment = '{environment}'"
    return int(bench.rows(sql)[0][0])


@pytest.mark.parametrize(
    "how",
    ["hang", "garbage", *(pytest.param(how, marks=pytest.mark.slow) for how in ("slow", "die", "nan"))],
)
async def test_an_environment_that_fails_is_left_out_while_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    order = tmp_path / "order"
    async with (
        two_environments(tmp_path, monkeypatch) as addresses,
        Bench(
            tmp_path,
            num_steps=ENDLESS,
            fleet=FLEET,
            breaker=QUICK_BREAKER,
            environments=addresses,
            max_tokens=4,
        ) as bench,
    ):
        await bench.start(step_seconds=0.05)
        for name in ("a1", "a2"):
            bench.actor(name, script=Script(), asks=True)
        await bench.reached(SOUND_STEPS)
        order.write_text(how)
        await until(lambda: bench.events("left_out"), "the turncoat to be left out")
        # It fails still: whoever waited for it would never come there.
        await bench.reached(OUTAGE_STEPS)
        others = trained(bench, "letters")
        (status,) = [each for each in (await bench.status()).environments if each.name == "turncoat"]
        order.unlink()
        await until(lambda: bench.events("back"), "the turncoat to be leased again")
        known = trained(bench, "turncoat")
        await until(lambda: trained(bench, "turncoat") > known, "the turncoat's groups to be trained again")
        await bench.abandon("a1", "a2")
        await bench.stop_coordinator()
        bench.check(complete=False)
        assert others >= 0.95 * OUTAGE_STEPS, "an undisturbed run trains one group a step of each"
        assert status.breaker in ("open", "probing")
        assert status.left_out
        if how == "garbage":
            assert status.infrastructure_faults >= 3
        rewards = [reward for (reward,) in bench.rows("SELECT reward FROM trajectories")]
        assert all(math.isfinite(reward) and 0.0 <= reward <= 1.0 for reward in rewards)
