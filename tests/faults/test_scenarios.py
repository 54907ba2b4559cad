"""Failures that other systems' trackers are full of, by name."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from penstock.trajectory import Lease

from .bench import PATIENT_FLEET, QUICK_FLEET, RESTART_FLEET, Bench, until
from .raw_actor import RawActor
from .scripted_actor import Script, fixed


async def test_a_missing_rollout_at_127_of_128_groups_is_named_and_made_again(tmp_path: Path):
    """One rollout of the last group vanishes with its actor; the step must neither hang nor go without."""
    async with Bench(tmp_path, num_steps=1, groups_per_step=128, group_size=2, max_lag=0) as bench:
        await bench.start()
        async with RawActor(bench.address, "vanishing") as raw:
            assert len(await raw.acquire(1)) == 1
            bench.actor("steady", num_slots=64)
            await bench.when(lambda status: status.num_groups_ready >= 127, "127 complete groups")
        await bench.trained()
        findings = bench.check()
    assert findings.trained == 128 * 2


async def test_max_lag_zero_never_trains_on_the_version_before_while_weights_are_in_transit(tmp_path: Path):
    """An actor that takes half a second to install each version must not start on the one it has."""
    slow_install = Script(install_seconds=0.5)
    async with Bench(tmp_path, num_steps=5, max_lag=0, fleet=PATIENT_FLEET) as bench:
        await bench.start()
        bench.actor("far", script=slow_install)
        bench.actor("near")
        await bench.trained()
        bench.check()
        assert bench.rows("SELECT DISTINCT lag, step = oldest_step FROM trajectories") == [(0, 1)]


def straggling(seconds: float) -> Script:
    """One slot of each group takes this long."""

    def num_tokens(lease: Lease) -> int:
        return int(seconds / 0.05) if lease.slot == 3 and lease.attempt == 0 else 2

    return Script(num_tokens=num_tokens, token_seconds=0.05)


async def test_a_straggler_in_a_group_is_waited_for_within_the_bound_and_trained(tmp_path: Path):
    async with Bench(tmp_path, num_steps=6, max_lag=2, fleet=PATIENT_FLEET) as bench:
        await bench.start()
        bench.actor("a1", script=straggling(2.0), num_slots=32)
        await bench.trained()
        findings = bench.check()
    assert findings.trained == 6 * 2 * 4, "every group is whole"


async def test_a_straggler_in_a_group_is_trained_after_a_resume_too(tmp_path: Path):
    """Coordinator and trainer die while one slot of a group is still played."""
    async with Bench(tmp_path, num_steps=6, max_lag=1, fleet=RESTART_FLEET) as bench:
        await bench.start()
        bench.actor("a1", script=straggling(3.0), num_slots=32)
        await bench.when(lambda status: status.ledger.accepted >= 6, "all but the stragglers")
        assert bench.coordinator is not None
        assert bench.trainer is not None
        bench.coordinator.kill()
        bench.trainer.kill()
        await bench.start()
        await bench.trained()
        findings = bench.check()
    assert findings.trained == 6 * 2 * 4


async def test_an_engine_that_dies_during_a_publish_holds_nobody_up(tmp_path: Path):
    """The version is published while an actor installs it and is killed; another goes on."""
    async with Bench(tmp_path, num_steps=6) as bench:
        await bench.start()
        victim = bench.actor("victim", script=Script(install_seconds=30.0))
        await until(lambda: victim.actor is not None, "it to join")
        bench.actor("steady")
        await bench.reached(2)
        await bench.abandon("victim")
        await bench.trained()
        bench.check()


async def test_no_cursor_runs_ahead_of_training_when_everything_crashes(tmp_path: Path):
    """Tasks are given out in order, and after a crash none is skipped: each is trained once."""
    async with Bench(tmp_path, num_steps=10, max_lag=2, fleet=RESTART_FLEET) as bench:
        await bench.start(step_seconds=0.1)
        bench.actor("a1", script=Script(num_tokens=fixed(4), token_seconds=0.01))
        await bench.reached(5)
        assert bench.coordinator is not None
        assert bench.trainer is not None
        bench.trainer.send(signal.SIGKILL)
        bench.coordinator.kill()
        await bench.abandon("a1")
        await bench.start()
        bench.actor("a2")
        await bench.trained()
        bench.check()
        groups = [group for (group,) in bench.rows("SELECT group_id FROM groups WHERE state = 'trained'")]
    assert groups == list(range(20)), "no task was passed over"


@pytest.mark.slow
async def test_a_lease_is_out_again_within_twelve_seconds_of_a_death_at_the_usual_settings(tmp_path: Path):
    """With dead_seconds 10 and a tick a second, by the coordinator's own clock."""
    usual = type(QUICK_FLEET)()
    async with Bench(tmp_path, num_steps=2, fleet=usual) as bench:
        await bench.start()
        victim = bench.actor("victim", script=Script(num_tokens=fixed(100), token_seconds=3600.0))
        await bench.when(lambda status: any(actor.num_leases for actor in status.actors), "leases")
        assert victim.actor is not None
        await bench.abandon("victim")
        bench.actor("heir")
        async with asyncio.timeout(90):
            await bench.trained()
        bench.check()
        (message,) = bench.events("dead")
    assert message.startswith("victim: no heartbeat for 1"), "10 to 11 s, not 60"
