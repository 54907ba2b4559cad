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
