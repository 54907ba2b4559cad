"""Actors that die, stop, come back, and come and go: nothing is lost, nothing hangs."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import time
from pathlib import Path
from statistics import median

import pytest

from learner.config import FleetConfig
from penstock.errors import EngineFault, NoProgress
from penstock.trajectory import Lease

from .bench import QUICK_FLEET, Bench, FaultLength, Process, until
from .scripted_actor import Script, ScriptedActor, fixed

_log = logging.getLogger(__name__)

SLOW = Script(num_tokens=fixed(20), token_seconds=0.05)
"""A second of work, so that there is time to die in the midst of it."""


async def test_an_undisturbed_run_is_found_in_order(tmp_path: Path):
    async with Bench(tmp_path, num_steps=6) as bench:
        await bench.start()
        bench.actor("a1")
        bench.actor("a2")
        await bench.trained()
        findings = bench.check()
    assert findings.trained == 6 * 2 * 4


async def holding_leases(bench: Bench, name: str) -> None:
    await bench.when(
        lambda status: any(actor.actor_id == name and actor.num_leases for actor in status.actors),
        f"{name} to hold leases",
    )


def idle(actor: ScriptedActor) -> bool:
    """Joined, and nothing to install yet."""
    return actor.actor is not None and actor.actor.state == "fetching weights"


def working(actor: ScriptedActor) -> bool:
    return actor.actor is not None and actor.actor.num_rollouts > 0


def submitting(actor: ScriptedActor) -> bool:
    return actor.actor is not None and actor.actor.uplink.num_unacknowledged > 0


STATES = {
    "idle": (idle, Script()),
    "working": (working, SLOW),
    "submitting": (submitting, Script(token_bytes=2000)),
    "installing": (idle, Script(install_seconds=1.0)),
}


@pytest.mark.parametrize("state", STATES)
async def test_an_actor_that_dies_in_any_state_leaves_no_group_stuck(tmp_path: Path, state: str):
    reached, script = STATES[state]
    async with Bench(tmp_path, num_steps=6) as bench:
        await bench.start_coordinator()
        if state != "idle":
            bench.start_trainer()
        victim = bench.actor("victim", script=script)
        await until(lambda: reached(victim), f"the victim to be {state}", every=0.001)
        await bench.abandon("victim")
        if state == "idle":
            bench.start_trainer()
        bench.actor("heir")
        await bench.trained()
        bench.check()
        assert [reason for (reason,) in bench.rows("SELECT closed FROM sessions WHERE actor_id = 'victim'")]


async def test_leases_of_a_killed_process_are_granted_again(tmp_path: Path):
    async with Bench(tmp_path, num_steps=6) as bench:
        await bench.start()
        victim = bench.actor_process("victim", "--num-tokens", "1000", "--token-seconds", "0.1")
        await holding_leases(bench, "victim")
        victim.kill()
        await until(lambda: bench.events("dead"), "the victim to be declared dead")
        bench.actor("heir")
        await bench.trained()
        bench.check()
        assert bench.rows("SELECT 1 FROM leases WHERE outcome = 'dead'")


async def test_an_actor_whose_engine_works_no_more_leaves_before_it_has_spoilt_a_group(tmp_path: Path):
    is_dead = asyncio.Event()

    def fault(lease: Lease) -> EngineFault | None:
        return EngineFault("the engine's process is gone") if is_dead.is_set() else None

    async with Bench(tmp_path, num_steps=30) as bench:
        await bench.start(step_seconds=0.1)
        broken = bench.actor("broken", script=Script(fault=fault))
        bench.actor("sound")
        await until(lambda: broken.player.lengths, "the actor to have worked")
        is_dead.set()
        with pytest.raises(
            NoProgress, match="fails one rollout after the other: the engine's process is gone"
        ):
            await bench.tasks.pop("broken")
        await bench.trained()
        bench.check()
        assert bench.rows("SELECT count(*) FROM groups WHERE state = 'dropped'") == [(0,)]
        assert bench.rows("SELECT count(*) FROM leases WHERE outcome = 'engine'")[0][0] >= 9


async def test_an_actor_that_is_stopped_and_continued_trains_nothing_twice(tmp_path: Path):
    """A zombie: its leases were granted again meanwhile, and its results come late."""
    async with Bench(tmp_path, num_steps=8) as bench:
        await bench.start(step_seconds=0.2)
        zombie = bench.actor_process("zombie", "--num-tokens", "20", "--token-seconds", "0.05")
        await holding_leases(bench, "zombie")
        zombie.send(signal.SIGSTOP)
        await until(lambda: bench.events("dead"), "the zombie to be declared dead")
        bench.actor("heir", script=SLOW)
        await bench.reached(2)
        zombie.send(signal.SIGCONT)
        await bench.trained()
        assert await zombie.end() == 0
        bench.check()
        sessions = bench.rows("SELECT closed FROM sessions WHERE actor_id = 'zombie'")
        assert len(sessions) == 2, "it joined again"


async def test_a_process_whose_name_another_took_is_fenced(tmp_path: Path):
    async with Bench(tmp_path, num_steps=8) as bench:
        await bench.start(step_seconds=0.1)
        older = bench.actor_process("twin", "--num-tokens", "20", "--token-seconds", "0.05")
        await holding_leases(bench, "twin")
        bench.actor("twin", script=SLOW)
        assert await older.end() != 0, "a fenced process stops"
        assert "replaced" in older.output()
        await bench.trained()
        # Both wrote one history: their sessions differ.
        bench.check()


async def test_a_run_without_actors_waits_and_goes_on_with_the_first_that_comes(tmp_path: Path):
    async with Bench(tmp_path, num_steps=8) as bench:
        await bench.start()
        for name in ("a1", "a2"):
            bench.actor(name, script=SLOW)
        await bench.reached(1)
        await bench.abandon("a1", "a2")
        await bench.when(lambda status: not status.actors, "nobody to be left")
        assert (await bench.status()).waiting_for
        bench.actor("a3")
        await bench.trained()
        bench.check()


async def test_a_loop_that_stands_still_is_noticed_by_its_lack_of_progress(tmp_path: Path):
    """Heartbeats of a process whose rollouts are stuck do not keep its leases."""
    stuck = Script(num_tokens=fixed(2), token_seconds=3600.0)
    fleet = dataclasses.replace(QUICK_FLEET, dead_seconds=60.0, suspect_seconds=30.0)
    async with Bench(tmp_path, num_steps=4, fleet=fleet) as bench:
        await bench.start()
        bench.actor("stuck", script=stuck)
        await holding_leases(bench, "stuck")
        bench.actor("sound")
        await until(lambda: bench.events("expired"), "its leases to expire")
        await bench.trainer_ended()
        await bench.abandon("stuck")
        await bench.trained()
        bench.check()


async def test_the_learner_forgives_what_happened_while_it_stood_still_itself(tmp_path: Path):
    async with Bench(tmp_path, num_steps=6) as bench:
        await bench.start()
        bench.actor("a1", script=SLOW)
        await holding_leases(bench, "a1")
        assert bench.coordinator is not None
        bench.coordinator.send(signal.SIGSTOP)
        await asyncio.sleep(2 * QUICK_FLEET.dead_seconds)
        bench.coordinator.send(signal.SIGCONT)
        await bench.trained()
        bench.check()
        assert bench.events("stall")
        assert not bench.events("dead")


async def test_actors_come_and_go_from_none_to_many_and_back(tmp_path: Path):
    async with Bench(tmp_path, num_steps=30, groups_per_step=4) as bench:
        await bench.start()
        for number in range(16):
            bench.actor(f"first-{number}", script=SLOW)
        await bench.reached(3)
        await bench.abandon(*(f"first-{number}" for number in range(8)))
        for number in range(8, 16):
            bench.actors[f"first-{number}"].stop.set("scaled down")
        await bench.when(lambda status: not status.actors, "nobody to be left")
        for number in range(4):
            bench.actor(f"second-{number}")
        await bench.trained()
        findings = bench.check()
    assert findings.trained == 30 * 4 * 4


@pytest.mark.timeout(1200)
async def test_sigterm_hands_leases_back_at_once_however_often(tmp_path: Path, fault_length: FaultLength):
    """Spot actors that come three at a time, and are told to go in mid-rollout."""
    num_rounds = fault_length.of(short=1, long=34)
    seconds: list[float] = []
    async with Bench(tmp_path, num_steps=6) as bench:
        await bench.start()
        for number in range(num_rounds):
            spots = {name: spot_actor(bench, name) for name in (f"spot-{number}-{n}" for n in range(3))}
            for name in spots:
                await holding_leases(bench, name)
            told = time.monotonic()
            for spot in spots.values():
                spot.send(signal.SIGTERM)
            for spot in spots.values():
                async with asyncio.timeout(30):
                    assert await spot.end() == 0
                seconds.append(time.monotonic() - told)
        outcomes = {outcome for (outcome,) in bench.rows("SELECT outcome FROM leases")}
        assert outcomes == {"drained"}, "none waited for a deadline"
        bench.actor("heir")
        await bench.trained()
        bench.check()
    _log.info("%d drains: median %.2f s, longest %.2f s", len(seconds), median(seconds), max(seconds))
    if fault_length is FaultLength.LONG:
        assert max(seconds) <= 10.0


def spot_actor(bench: Bench, name: str) -> Process:
    return bench.actor_process(name, "--num-tokens", "1000", "--token-seconds", "0.1")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
async def test_at_the_usual_settings_a_minute_without_actors_costs_a_minute(tmp_path: Path, how: str):
    """All are gone for a minute. Killed, then one comes: it works within 15 s. Stopped, then continued: fenced."""
    async with Bench(tmp_path, num_steps=20, fleet=FleetConfig()) as bench:
        await bench.start(step_seconds=0.5)
        options = ("--num-tokens", "20", "--token-seconds", "0.02")
        first = [bench.actor_process(f"first-{n}", *options) for n in range(2)]
        await bench.reached(3)
        for actor in first:
            actor.send(signal.Signals[how])
        await bench.when(lambda status: not status.actors, "nobody to be left")
        assert (await bench.status()).waiting_for
        reached = (await bench.status()).version.step
        await asyncio.sleep(60.0)
        for actor in first if how == "SIGSTOP" else ():
            actor.send(signal.SIGCONT)
        if how == "SIGKILL":
            bench.actor("second")
        came = time.monotonic()
        await bench.reached(reached + 1)
        seconds = time.monotonic() - came
        _log.info("a version %.1f s after an actor was there again", seconds)
        assert seconds <= 15.0
        await bench.trained()
        for actor in first:
            assert await actor.end() == (0 if how == "SIGSTOP" else -signal.SIGKILL)
        bench.check()
        sessions = bench.rows("SELECT closed FROM sessions WHERE actor_id LIKE 'first-%'")
        assert len(sessions) == (4 if how == "SIGSTOP" else 2), "those that were stopped joined again"
