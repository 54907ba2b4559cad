"""Faults in the middle of a broadcast: the trainer goes on, who is sound is current, and nothing is generated
under weights that were not confirmed.

A real coordinator starts real senders; each actor's member is a process of its own, which is struck as soon as
a version begins to arrive in it. Versions are large enough for that to be in the middle.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from learner.config import FleetConfig, WeightsConfig
from penstock.broadcast.process import MemberProcess
from penstock.broadcast.words import Event, EventKind
from penstock.v1 import operator_pb2
from penstock.weights.manifest import WeightsMedium
from penstock.weights.media.collective import CollectiveReceiver
from tests.broadcast_groups import ObservedMember

from .bench import Bench, until
from .scripted_actor import Script

BALLAST_BYTES = 96 * 1024 * 1024
STEP_SECONDS = 0.3
WEIGHTS = WeightsConfig(
    medium=WeightsMedium.COLLECTIVE, stable_seconds=0.2, regroup_seconds=0.2, timeout_seconds=3.0
)
FLEET = FleetConfig(
    heartbeat_seconds=0.25, suspect_seconds=10.0, dead_seconds=20.0, progress_timeout_seconds=200.0
)
"""A busy machine looks like a dead one sooner than a version of this size is copied."""


class Members:
    """The members of one actor, which are struck once."""

    def __init__(self) -> None:
        self.observed = ObservedMember(self._on_event)
        self.receiver = CollectiveReceiver(host="127.0.0.1", device="cpu", start=self.observed)
        self._strike: Callable[[MemberProcess], None] | None = None

    def strike(self, with_what: Callable[[MemberProcess], None]) -> None:
        """In the middle of the next broadcast."""
        self._strike = with_what

    @property
    def is_struck(self) -> bool:
        return self._strike is None

    def _on_event(self, process: MemberProcess, event: Event) -> None:
        if event.kind == EventKind.BEGAN and self._strike is not None:
            strike, self._strike = self._strike, None
            strike(process)


def make_bench(folder: Path) -> Bench:
    return Bench(folder, num_steps=100_000, fleet=FLEET, weights=WEIGHTS)


async def start(bench: Bench, *names: str) -> dict[str, Members]:
    """A run whose versions are being broadcast to these actors."""
    await bench.start_coordinator()
    bench.start_trainer(step_seconds=STEP_SECONDS, ballast_bytes=BALLAST_BYTES)
    members = {name: Members() for name in names}
    for name, each in members.items():
        bench.actor(name, script=Script(), groups=each.receiver)
    await bench.when(
        lambda status: (
            status.broadcasts.num_members == len(names)
            and all(actor.weights.medium == "broadcast" for actor in status.actors)
        ),
        "versions to be broadcast",
    )
    return members


async def goes_on(bench: Bench, name: str) -> None:
    """The trainer trains, and an actor is current within one publication."""
    now = (await bench.status()).version.step
    await bench.reached(now + 3)

    def is_current(status: operator_pb2.GetStatusResponse) -> bool:
        actor = next(each for each in status.actors if each.actor_id == name)
        return actor.installed.step >= now + 3

    await bench.when(is_current, f"{name} to be current")


async def finish(bench: Bench) -> None:
    await bench.abandon(*bench.tasks)
    await bench.stop_coordinator()
    bench.check(complete=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGSTOP, signal.SIGKILL],
    ids=lambda each: each.name,
)
async def test_a_member_that_is_struck_in_the_middle_holds_nobody_up(tmp_path: Path, number: signal.Signals):
    async with make_bench(tmp_path) as bench:
        members = await start(bench, "a1", "a2")
        members["a1"].strike(lambda process: os.kill(process.pid, number))
        await until(lambda: members["a1"].is_struck, "a broadcast to begin")
        await bench.when(lambda status: bool(status.broadcasts.fallbacks), "the broadcast to fail")
        await goes_on(bench, "a2")
        await goes_on(bench, "a1")
        await until(lambda: bench.events("broadcast"), "an event")
        await until(
            lambda: any("because of a1" in event for event in bench.events("broadcast")), "a1 to be named"
        )
        known = (await bench.status()).broadcasts
        await bench.when(
            lambda status: status.broadcasts.num_broadcasts > known.num_broadcasts,
            "a new group to be sent to",
        )
        await finish(bench)


@pytest.mark.slow
async def test_an_actor_that_is_killed_in_the_middle_leaves_a_group_of_the_others(tmp_path: Path):
    async with make_bench(tmp_path) as bench:
        members = await start(bench, "a1")
        victim = bench.actor_process("victim", "--groups")
        await bench.when(lambda status: status.broadcasts.num_members == 2, "the victim to be in the group")
        members["a1"].strike(lambda _: victim.send(signal.SIGKILL))
        await until(lambda: members["a1"].is_struck, "a broadcast to begin")
        await goes_on(bench, "a1")
        await bench.when(lambda status: status.broadcasts.num_members != 2, "the group to end")
        known = (await bench.status()).broadcasts
        await bench.when(
            lambda status: (
                status.broadcasts.num_members == 1 and status.broadcasts.num_broadcasts > known.num_broadcasts
            ),
            "a group of those who are left",
        )
        await finish(bench)


async def test_a_trainer_that_is_killed_in_the_middle_is_followed_by_the_next(tmp_path: Path):
    """Actors take the versions of the new trainer, and the group outlives the old one."""
    async with make_bench(tmp_path) as bench:
        members = await start(bench, "a1", "a2")
        trainer = bench.trainer
        assert trainer is not None
        members["a1"].strike(lambda _: trainer.send(signal.SIGKILL))
        await until(lambda: members["a1"].is_struck, "a broadcast to begin")
        trainer.popen.wait()
        bench.start_trainer(step_seconds=STEP_SECONDS, ballast_bytes=BALLAST_BYTES)
        await bench.when(lambda status: status.version.epoch == 2, "the next trainer to publish")
        known = (await bench.status()).broadcasts.num_broadcasts
        for name in members:
            await goes_on(bench, name)
        await bench.when(
            lambda status: status.broadcasts.num_broadcasts > known, "a version of the new trainer to be sent"
        )
        await finish(bench)


@pytest.mark.slow
async def test_a_sender_that_is_killed_or_stopped_is_replaced(tmp_path: Path):
    async with make_bench(tmp_path) as bench:
        members = await start(bench, "a1")
        assert bench.coordinator is not None
        (sender,) = psutil.Process(bench.coordinator.pid).children()
        members["a1"].strike(lambda _: sender.suspend())
        await until(lambda: members["a1"].is_struck, "a broadcast to begin")
        await bench.when(lambda status: "sender" in status.broadcasts.fallbacks, "the sender to be given up")
        await goes_on(bench, "a1")
        assert not sender.is_running()
        await bench.when(lambda status: status.broadcasts.num_groups > 1, "another group")
        await finish(bench)
