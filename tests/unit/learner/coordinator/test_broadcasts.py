"""Senders are started, told, replaced and ended: with fakes for processes, and a clock."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from learner.config import FleetConfig, WeightsConfig
from learner.coordinator.broadcasts import Broadcasts
from learner.coordinator.fleet import ActorInfo, Fleet
from penstock.broadcast.words import Event, EventKind, Formation, Reason, Sending, Settings
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import CollectiveMedium, Manifest, SharedMemoryMedium, WeightsMedium
from penstock.weights.staged import stage
from tests.weight_fixtures import tensors

CONFIG = WeightsConfig(
    medium=WeightsMedium.COLLECTIVE, stable_seconds=1.0, regroup_seconds=1.0, timeout_seconds=4.0
)


class FakeSender:
    def __init__(self, settings: Settings, on_event: Callable[[Event], None]) -> None:
        self.settings = settings
        self.told: list[Formation | Sending] = []
        self.is_killed = False
        self._on_event = on_event

    def tell(self, command: Formation | Sending) -> None:
        self.told.append(command)

    def kill(self) -> None:
        self.is_killed = True

    async def says(self, kind: EventKind, **fields: Any) -> None:
        self._on_event(Event(kind=kind, **fields))
        await asyncio.sleep(0)


class World:
    """A coordinator of which there is a fleet and a clock."""

    def __init__(self, config: WeightsConfig = CONFIG) -> None:
        self.now = 0.0
        self.fleet = Fleet(FleetConfig())
        self.events: list[str] = []
        self.num_announced = 0
        scheduler = SimpleNamespace(
            fleet=self.fleet, note_event=lambda _, message: self.events.append(message)
        )
        coordinator: Any = SimpleNamespace(
            scheduler=scheduler, clock=lambda: self.now, announce=self._announce
        )
        self.senders: list[FakeSender] = []
        self.broadcasts = Broadcasts(coordinator, config, host="127.0.0.1", device="auto", start=self._start)

    def join(self, name: str, *, device: str = "cpu") -> None:
        info = ActorInfo(
            actor_id=name,
            engine="torch",
            num_slots=1,
            hostname=socket.gethostname(),
            device=device,
            weights_medium=WeightsMedium.AUTO,
        )
        session = self.fleet.join(f"session of {name}", len(self.fleet), info, self.now)
        session.installed = PolicyVersion(1, 0)

    def look(self, seconds: float = 0.0) -> None:
        """Lets time pass, in which everybody is heard."""
        self.now += seconds
        for session in self.fleet.sessions():
            session.heard_at = self.now
        self.broadcasts._look()

    async def stand(self, *names: str) -> FakeSender:
        """A group of these."""
        for name in names:
            self.join(name)
        self.look()
        self.look(1.0)
        sender = self.senders[-1]
        await sender.says(EventKind.LISTENING, port=7, device="cpu")
        await sender.says(EventKind.FORMED)
        return sender

    def _start(self, settings: Settings, on_event: Callable[[Event], None]) -> FakeSender:
        self.senders.append(FakeSender(settings, on_event))
        return self.senders[-1]

    def _announce(self) -> None:
        self.num_announced += 1


def version(step: int) -> Manifest:
    manifest = stage(PolicyVersion(1, step), tensors(seed=step)).manifest
    medium = SharedMemoryMedium(name=f"x.{step:016x}", nonce="ab" * 16)
    return dataclasses.replace(manifest, media=(medium,))


async def test_a_version_is_sent_to_the_group_that_stands() -> None:
    world = World()
    assert world.broadcasts.offer(version(0)) == ()
    sender = await world.stand("a", "b")
    assert isinstance(sender.told[0], Formation)
    assert sender.told[0].size == 3
    (medium,) = world.broadcasts.offer(version(1))
    assert medium == CollectiveMedium(group=sender.told[0].group)
    assert isinstance(sender.told[1], Sending)
    assert sender.told[1].version == PolicyVersion(1, 1)
    assert world.broadcasts.status().state == "sending"
    await sender.says(EventKind.SENT, digest="ab", num_bytes=10, seconds=1.0)
    status = world.broadcasts.status()
    assert (status.state, status.num_broadcasts, status.num_members) == ("standing", 1, 2)


async def test_members_alone_are_invited_while_their_group_forms() -> None:
    world = World()
    for name in ("a", "b"):
        world.join(name)
    world.look()
    world.look(1.0)
    assert world.broadcasts.invitation("session of a") is None, "the sender does not listen yet"
    before = world.num_announced
    await world.senders[0].says(EventKind.LISTENING, port=7, device="cpu")
    assert world.num_announced == before + 1, "those who watch are woken"
    invitation = world.broadcasts.invitation("session of b")
    assert invitation is not None
    assert (invitation.port, invitation.rank, invitation.size, invitation.backend) == (7, 2, 3, "gloo")
    assert world.broadcasts.invitation("session of a stranger") is None
    assert any("group of 2 actors forms" in line for line in world.broadcasts.why())
    assert world.broadcasts.offer(version(0)) == (), "nobody waits for a group that forms"
    await world.senders[0].says(EventKind.FORMED)
    assert world.broadcasts.invitation("session of b") is None


async def test_of_versions_that_are_published_while_one_is_sent_the_newest_follows() -> None:
    world = World()
    sender = await world.stand("a")
    for step in range(1, 4):
        assert world.broadcasts.offer(version(step))
    assert len(sender.told) == 2
    await sender.says(EventKind.SENT)
    last = sender.told[-1]
    assert isinstance(last, Sending)
    assert last.version == PolicyVersion(1, 3)


async def test_why_tells_of_a_broadcast_that_is_waited_for_and_until_when() -> None:
    world = World()
    sender = await world.stand("a", "b")
    world.broadcasts.offer(version(1))
    world.now += 2.0
    await sender.says(EventKind.MOVED, num_bytes=20_000)
    world.now += 1.0
    (line,) = world.broadcasts.why()
    assert "version 1.1 is broadcast to 2 actors since 3.0 s" in line
    assert "for 3.0 s, they pull" in line


async def test_a_failure_ends_the_group_and_the_next_waits_until_it_is_known_at_whose_fault() -> None:
    world = World()
    sender = await world.stand("a", "b")
    world.broadcasts.offer(version(1))
    await sender.says(EventKind.FAILED, reason=Reason.TIMEOUT, message="a piece took long")
    assert world.broadcasts.offer(version(2)) == ()
    world.look(5.0)
    assert len(world.senders) == 1
    await sender.says(EventKind.SILENT, ranks=(2,))
    assert any("because of b" in event for event in world.events)
    assert sender.is_killed, "whatever it is stuck in"
    await sender.says(EventKind.ENDED)
    world.look(0.1)
    assert len(world.senders) == 2
    assert dict(world.broadcasts.status().fallbacks) == {"timeout": 1}


async def test_a_sender_that_says_nothing_is_killed_after_twice_the_time_of_a_piece() -> None:
    world = World()
    sender = await world.stand("a")
    world.look(1000.0)
    assert not sender.is_killed, "between two versions there is nothing to say"
    world.broadcasts.offer(version(1))
    world.look(7.9)
    assert not sender.is_killed
    world.look(0.2)
    assert sender.is_killed
    assert dict(world.broadcasts.status().fallbacks) == {"sender": 1}


@pytest.mark.parametrize("is_listening", [False, True])
async def test_a_sender_whose_group_never_forms_is_killed(is_listening: bool) -> None:
    world = World()
    world.join("a")
    world.look()
    world.look(1.0)
    if is_listening:
        await world.senders[0].says(EventKind.LISTENING, port=7, device="cpu")
    world.look(2 * CONFIG.forming_seconds + 1.0)
    assert world.senders[0].is_killed
    assert world.broadcasts.invitation("session of a") is None


async def test_a_newcomer_s_group_replaces_the_one_that_stands_after_what_that_sends() -> None:
    world = World()
    first = await world.stand("a")
    world.broadcasts.offer(version(1))
    second = await world.stand("b")
    assert first is not second
    assert not first.is_killed
    (medium,) = world.broadcasts.offer(version(2))
    assert isinstance(second.told[0], Formation)
    assert medium.group == second.told[0].group
    await first.says(EventKind.SENT)
    assert first.is_killed
    assert not world.broadcasts.status().fallbacks


async def test_a_member_that_leaves_between_two_versions_costs_nobody_anything() -> None:
    world = World()
    first = await world.stand("a", "b")
    world.fleet.remove("session of b")
    world.look(0.2)
    assert first.is_killed
    await world.senders[-1].says(EventKind.LISTENING, port=8, device="cpu")
    assert isinstance(world.senders[-1].told[0], Formation)
    assert world.senders[-1].told[0].size == 2
    assert not world.broadcasts.status().fallbacks


async def test_a_process_that_ends_by_itself_is_a_failure_once() -> None:
    world = World()
    sender = await world.stand("a")
    await sender.says(EventKind.ENDED, message="its process ended with status 1")
    await sender.says(EventKind.ENDED)
    assert dict(world.broadcasts.status().fallbacks) == {"sender": 1}
    assert world.broadcasts.offer(version(1)) == ()


async def test_closing_kills_every_sender() -> None:
    world = World()
    sender = await world.stand("a")
    world.broadcasts.close()
    assert sender.is_killed


def test_a_run_that_pulls_starts_nothing() -> None:
    world = World(WeightsConfig(medium=WeightsMedium.PULL))
    world.join("a")
    world.look()
    world.look(100.0)
    assert not world.senders
    assert world.broadcasts.status().state == "off"
