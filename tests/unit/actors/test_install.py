from __future__ import annotations

import asyncio
import threading

import numpy as np

from actors.install import Installer
from penstock.codec import manifest_to_wire
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import HostTensor, Manifest
from penstock.weights.staged import StagedWeights, stage

from .fakes import ScriptedEngine


def staged(step: int) -> StagedWeights:
    data = np.full(8, step, dtype=np.uint8)
    return stage(PolicyVersion(1, step), [HostTensor(name="w", dtype="F32", shape=(2,), data=data)])


class Fetcher:
    """Fetches at once, or holds until it is let go; fails as often as it is told to."""

    def __init__(self, *, failures: int = 0) -> None:
        self.failures = failures
        self.fetched: list[int] = []
        self.in_place: list[bool] = []
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def fetch(
        self,
        manifest: Manifest,
        *,
        timeout_seconds: float,
        in_place: bool,
        abandoned: threading.Event | None = None,
    ) -> StagedWeights:
        self.in_place.append(in_place)
        self.started.set()
        assert self.go_on.wait(timeout=20)
        if self.failures:
            self.failures -= 1
            raise WeightTransferError("as told")
        self.fetched.append(manifest.version.step)
        return staged(manifest.version.step)

    def close(self) -> None: ...


async def run_until(installer: Installer, step: int) -> None:
    """Runs the installer until a version is installed."""
    task = asyncio.create_task(installer.run())
    async with asyncio.timeout(20):
        change = installer.installed_event
        while installer.installed is None or installer.installed[0].step != step:
            await change.wait()
            change = installer.installed_event
    task.cancel()
    await asyncio.wait([task])


async def test_an_announced_version_is_installed_and_confirmed():
    engine, fetcher = ScriptedEngine([]), Fetcher()
    installer = Installer(engine, fetcher)  # type: ignore[arg-type]
    manifest = staged(3).manifest
    installer.announce(manifest_to_wire(manifest))
    await run_until(installer, 3)
    assert installer.installed == (PolicyVersion(1, 3), manifest.digest)
    assert engine.installed == PolicyVersion(1, 3)


async def test_a_failed_transfer_changes_nothing_and_is_tried_again():
    engine, fetcher = ScriptedEngine([]), Fetcher(failures=1)
    installer = Installer(engine, fetcher)  # type: ignore[arg-type]
    installer.announce(manifest_to_wire(staged(1).manifest))
    await run_until(installer, 1)
    assert fetcher.fetched == [1]
    assert len(engine.installs) == 1


async def test_versions_that_come_during_a_fetch_are_skipped_but_the_newest():
    engine, fetcher = ScriptedEngine([]), Fetcher()
    fetcher.go_on.clear()
    installer = Installer(engine, fetcher)  # type: ignore[arg-type]
    installer.announce(manifest_to_wire(staged(1).manifest))
    task = asyncio.create_task(run_until(installer, 4))
    await asyncio.to_thread(fetcher.started.wait, 20)
    for step in (2, 3, 4):
        installer.announce(manifest_to_wire(staged(step).manifest))
    fetcher.go_on.set()
    await task
    assert fetcher.fetched == [1, 4], "a fetch that began is not given up for each newer version"


async def test_an_engine_that_verifies_reads_the_trainers_own_memory_until_that_fails():
    engine, fetcher = ScriptedEngine([]), Fetcher(failures=1)
    engine.verifies = True
    installer = Installer(engine, fetcher)  # type: ignore[arg-type]
    for step in (1, 2):
        installer.announce(manifest_to_wire(staged(step).manifest))
        await run_until(installer, step)
    assert fetcher.in_place == [True, False, True]


class Bystander:
    """Says what is being generated, as the actor does."""

    def __init__(self) -> None:
        self.allows = True

    def __call__(self, version: PolicyVersion) -> bool:
        return self.allows


async def settled(installer: Installer) -> None:
    """Until there is nothing that the installer would do now."""
    for _ in range(50):
        await asyncio.sleep(0.002)


async def test_a_held_version_stays_whatever_is_announced_until_it_is_let_go():
    engine, fetcher = ScriptedEngine([]), Fetcher()
    installer = Installer(engine, fetcher)  # type: ignore[arg-type]
    task = asyncio.create_task(installer.run())
    installer.hold(PolicyVersion(1, 1), manifest_to_wire(staged(1).manifest), seconds=60.0)
    installer.announce(manifest_to_wire(staged(1).manifest))
    installer.announce(manifest_to_wire(staged(2).manifest))
    await settled(installer)
    assert engine.installed == PolicyVersion(1, 1)
    assert installer.generates(PolicyVersion(1, 1))
    installer.let_go()
    await settled(installer)
    assert engine.installed == PolicyVersion(1, 2)
    assert not installer.generates(PolicyVersion(1, 1))
    task.cancel()


async def test_a_hold_ends_by_itself():
    engine, fetcher = ScriptedEngine([]), Fetcher()
    now = 0.0
    installer = Installer(engine, fetcher, clock=lambda: now)  # type: ignore[arg-type]
    task = asyncio.create_task(installer.run())
    installer.hold(PolicyVersion(1, 1), manifest_to_wire(staged(1).manifest), seconds=5.0)
    installer.announce(manifest_to_wire(staged(2).manifest))
    await settled(installer)
    assert engine.installed == PolicyVersion(1, 1)
    now = 5.0
    installer.look()
    await settled(installer)
    assert engine.installed == PolicyVersion(1, 2)
    task.cancel()


async def test_an_older_version_is_installed_once_nothing_is_generated_any_more():
    engine, fetcher, bystander = ScriptedEngine([]), Fetcher(), Bystander()
    installer = Installer(engine, fetcher, may_install=bystander)  # type: ignore[arg-type]
    task = asyncio.create_task(installer.run())
    installer.announce(manifest_to_wire(staged(3).manifest))
    await settled(installer)
    bystander.allows = False
    installer.hold(PolicyVersion(1, 1), manifest_to_wire(staged(1).manifest), seconds=60.0)
    await settled(installer)
    assert installer.turns_back
    assert engine.installed == PolicyVersion(1, 3)
    bystander.allows = True
    installer.look()
    await settled(installer)
    assert not installer.turns_back
    assert engine.installed == PolicyVersion(1, 1)
    task.cancel()


async def test_a_version_that_was_being_fetched_when_a_hold_began_is_not_installed():
    engine, fetcher = ScriptedEngine([]), Fetcher()
    installer = Installer(engine, fetcher)  # type: ignore[arg-type]
    task = asyncio.create_task(installer.run())
    installer.announce(manifest_to_wire(staged(1).manifest))
    await settled(installer)
    fetcher.started.clear()
    fetcher.go_on.clear()
    installer.announce(manifest_to_wire(staged(2).manifest))
    await asyncio.to_thread(fetcher.started.wait, 20)
    installer.hold(PolicyVersion(1, 1), None, seconds=60.0)
    fetcher.go_on.set()
    await settled(installer)
    assert engine.installed == PolicyVersion(1, 1)
    task.cancel()


async def test_a_held_version_that_cannot_be_had_is_given_up():
    engine, fetcher = ScriptedEngine([]), Fetcher(failures=3)
    installer = Installer(engine, fetcher)  # type: ignore[arg-type]
    installer.announce(manifest_to_wire(staged(2).manifest))
    installer.hold(PolicyVersion(1, 1), manifest_to_wire(staged(1).manifest), seconds=60.0)
    await run_until(installer, 2)
    assert fetcher.fetched == [2]
