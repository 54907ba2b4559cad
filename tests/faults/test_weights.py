"""Faults on the way of weights: what an actor generates under is always a version that was published, whole.

A learner in a process of its own publishes and serves; the actor here has no shared memory with it, as
on another host, and its engine notes under which tensors it would generate. At every point something is
killed or corrupted. Then the actor must be current within one publication.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.engines.base import InstallReport
from actors.install import Installer
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.v1 import weights_pb2
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import Blob, HostTensor, Medium
from penstock.weights.media.base import Chunk, Patience
from penstock.weights.media.zeromq import ZeromqReceiver
from penstock.weights.segment import segment_path
from penstock.weights.staged import StagedWeights, stage
from tests.weight_fixtures import CHUNK, flip_byte, moved, tensor, tensors

SECONDS = 60.0
NUM_BYTES_OF_A_DELTA_HEADER = 68

LEARNER = """
import dataclasses, os, sys
from penstock.codec import manifest_to_wire
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import ZeromqMedium
from penstock.weights.media.zeromq import ZeromqServer
from penstock.weights.version_log import VersionLog
from tests.faults.test_weights import content_of
from tests.weight_fixtures import CHUNK

log = VersionLog(name_prefix=sys.argv[1], chunk_bytes=CHUNK)
server = ZeromqServer("tcp://127.0.0.1:0")
for line in sys.stdin:
    epoch, step = map(int, line.split())
    written = log.write(PolicyVersion(epoch, step), content_of(step), with_delta=True)
    server.add(written)
    offered = dataclasses.replace(written, media=(ZeromqMedium(endpoint=server.endpoint),))
    print(manifest_to_wire(offered).SerializeToString().hex(), flush=True)
server.close()
log.close()
"""


def content_of(step: int) -> list[HostTensor]:
    """A version's tensors; each is the one before it, moved."""
    content = [tensor("long", (40_000,), dtype="BF16"), *tensors()]
    for number in range(step):
        content = moved(content, number)
    return content


class Learner:
    def __init__(self) -> None:
        self._epoch = 0
        self.start()

    def start(self) -> None:
        """A new trainer: its versions are of a new epoch."""
        self._epoch += 1
        self._process = subprocess.Popen(
            [sys.executable, "-c", LEARNER, f"penstock-test-faults-{os.getpid()}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    def publish(self, step: int) -> weights_pb2.WeightManifest:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{self._epoch} {step}\n")
        self._process.stdin.flush()
        return weights_pb2.WeightManifest.FromString(bytes.fromhex(self._process.stdout.readline()))

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._close()

    def stop(self) -> None:
        self._close()

    def _close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=SECONDS)
        self._process.stdout.close()


class Engine:
    """Generates under what it installed last: notes every version with its tensors' digest."""

    verifies = False

    def __init__(self) -> None:
        self.generated_under: list[tuple[PolicyVersion, str]] = []

    async def install(self, staged: StagedWeights) -> InstallReport:
        held = [
            HostTensor(
                name=entry.name,
                dtype=entry.dtype,
                shape=entry.shape,
                data=staged.buffer[entry.offset : entry.offset + entry.num_bytes].copy(),
            )
            for entry in staged.manifest.tensors
        ]
        digest = stage_digest(held)
        self.generated_under.append((staged.manifest.version, digest))
        return InstallReport(
            version=staged.manifest.version,
            digest=staged.manifest.digest,
            pause_seconds=0.0,
            tensors_seconds=0.0,
        )


def stage_digest(content: Sequence[HostTensor]) -> str:
    return stage(PolicyVersion(0, 0), content).manifest.digest


class Line:
    """A ZeroMQ receiver on a line where faults happen: each is used once, on the chunk of its number."""

    medium = ZeromqReceiver().medium

    def __init__(self) -> None:
        self._inner = ZeromqReceiver(resend_seconds=0.2, progress_seconds=1.0)
        self._faults: dict[int, str] = {}
        self._kill: Callable[[], None] | None = None
        self.happened = threading.Event()

    def kill_at(self, number: int, kill: Callable[[], None]) -> None:
        """Kills the other end as soon as a chunk is here: those behind it are asked for, and may never come."""
        self.break_at(number, "killed")
        self._kill = kill

    def break_at(self, number: int, fault: str) -> None:
        self._faults[number] = fault
        self.happened.clear()

    def chunks(
        self, blob: Blob, medium: Medium, indices: Sequence[int], patience: Patience
    ) -> Generator[Chunk, None, None]:
        held_back: Chunk | None = None
        with contextlib.closing(self._inner.chunks(blob, medium, indices, patience)) as chunks:
            for number, (index, data) in enumerate(chunks):
                fault = self._faults.pop(number, "")
                if fault == "killed":
                    assert self._kill is not None
                    self._kill()
                if fault:
                    self.happened.set()
                match fault:
                    case "flipped":
                        data = data.copy()
                        data[data.size // 2] ^= 16
                    case "missing":
                        continue
                    case "repeated":
                        yield index, data
                    case "reordered":
                        held_back = index, data.copy()
                        continue
                    case "cut":
                        raise WeightTransferError("the line was cut")
                yield index, data
        if held_back is not None:
            yield held_back

    def close(self) -> None:
        self._inner.close()


class Actor:
    """The real installer and fetcher around an engine that notes what it would generate under."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.line = Line()
        self._fetcher = WeightFetcher([self.line])
        self.installer = Installer(self.engine, self._fetcher)  # type: ignore[arg-type]

    async def current(self, message: weights_pb2.WeightManifest) -> None:
        """Announces a version and waits until the engine generates under it."""
        self.installer.announce(message)
        async with asyncio.timeout(SECONDS):
            while self.installer.installed is None or self.installer.installed[1] != message.digest:
                await self.installer.installed_event.wait()

    def assert_only_published(self) -> None:
        for version, digest in self.engine.generated_under:
            assert digest == stage_digest(content_of(version.step)), version

    def close(self) -> None:
        self._fetcher.close()


@pytest.fixture
def learner():
    learner = Learner()
    yield learner
    learner.stop()


@pytest.fixture
async def actor() -> AsyncIterator[Actor]:
    actor = Actor()
    async with asyncio.TaskGroup() as tasks:
        installing = tasks.create_task(actor.installer.run(), name="installer")
        yield actor
        installing.cancel()
    actor.close()


@pytest.mark.parametrize("fault", ["flipped", "missing", "repeated", "reordered", "cut"])
async def test_a_faulty_line_delays_a_version_and_never_spoils_one(
    learner: Learner, actor: Actor, fault: str
) -> None:
    """On a delta, on a snapshot's chunks, and on a version that is fetched whole."""
    actor.line.break_at(7, fault)
    await actor.current(learner.publish(0))
    for step in (1, 2, 3):
        actor.line.break_at(0, fault)
        await actor.current(learner.publish(step))
        assert actor.line.happened.is_set()
    actor.assert_only_published()


@pytest.mark.parametrize("has_a_base", [False, True])
async def test_a_learner_that_is_killed_in_the_middle_of_a_transfer(
    learner: Learner, actor: Actor, has_a_base: bool
) -> None:
    if has_a_base:
        await actor.current(learner.publish(0))
    # A delta has one chunk. Without one the first of the version's chunks are here, and the rest never comes.
    actor.line.kill_at(0, learner.kill)
    actor.installer.announce(learner.publish(1))
    assert await asyncio.to_thread(actor.line.happened.wait, SECONDS)
    learner.start()
    # What the new learner publishes has no delta from what is held: another trainer's, another epoch's.
    await actor.current(learner.publish(2))
    await actor.current(learner.publish(3))
    actor.assert_only_published()
    generated_under = [version for version, _ in actor.engine.generated_under]
    assert generated_under[-2:] == [PolicyVersion(2, 2), PolicyVersion(2, 3)]


async def test_a_learner_that_is_killed_between_its_announcement_and_the_transfer(
    learner: Learner, actor: Actor
) -> None:
    await actor.current(learner.publish(0))
    lost = learner.publish(1)
    learner.kill()
    actor.installer.announce(lost)
    learner.start()
    await actor.current(learner.publish(2))
    actor.assert_only_published()
    assert [version for version, _ in actor.engine.generated_under] == [
        PolicyVersion(1, 0), PolicyVersion(2, 2)
    ]  # fmt: skip


async def test_a_corrupt_delta_and_a_corrupt_snapshot_in_the_learner_s_memory(
    learner: Learner, actor: Actor
) -> None:
    await actor.current(learner.publish(0))
    message = learner.publish(1)
    flip_byte(message.deltas[-1].segment.name, NUM_BYTES_OF_A_DELTA_HEADER)
    await actor.current(message)
    fresh = Actor()
    async with asyncio.TaskGroup() as tasks:
        installing = tasks.create_task(fresh.installer.run(), name="installer")
        message = learner.publish(2)
        flip_byte(message.snapshot.segment.name, 3 * CHUNK)
        await fresh.current(message)
        installing.cancel()
    fresh.close()
    await actor.current(learner.publish(3))
    for each in (actor, fresh):
        each.assert_only_published()


async def test_a_held_version_whose_memory_went_bad_is_no_base(learner: Learner, actor: Actor) -> None:
    message = learner.publish(0)
    await actor.current(message)
    held = actor._fetcher._newest.packed
    held[np.arange(0, held.size, 5000)] ^= 1
    await actor.current(learner.publish(1))
    actor.assert_only_published()


ACTOR = """
import sys
from penstock.codec import manifest_from_wire
from penstock.v1 import weights_pb2
from penstock.weights.fetch import WeightFetcher
from penstock.weights.media.zeromq import ZeromqReceiver
from tests.weight_fixtures import ObservedReceiver

def arrived(number):
    if number == int(sys.argv[1]):
        print("in the middle", flush=True)
        sys.stdin.readline()

fetcher = WeightFetcher([ObservedReceiver(ZeromqReceiver(), before=arrived)])
for line in sys.stdin:
    fetcher.fetch(manifest_from_wire(weights_pb2.WeightManifest.FromString(bytes.fromhex(line))), timeout_seconds=60)
"""


def kill_in_the_middle_of_a_fetch(message: weights_pb2.WeightManifest) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-c", ACTOR, "5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert victim.stdin is not None
    assert victim.stdout is not None
    victim.stdin.write(message.SerializeToString().hex() + "\n")
    victim.stdin.flush()
    assert victim.stdout.readline() == "in the middle\n"
    victim.kill()
    victim.communicate(timeout=SECONDS)


async def test_an_actor_that_is_killed_in_the_middle_of_a_fetch_leaves_the_others_and_its_successor_alone(
    learner: Learner, actor: Actor
) -> None:
    message = learner.publish(0)
    await asyncio.to_thread(kill_in_the_middle_of_a_fetch, message)
    await actor.current(message)
    await actor.current(learner.publish(1))
    actor.assert_only_published()


SMALL_DEV_SHM = """
import os, tempfile
tempfile.tempdir = {room!r}
reserve = os.posix_fallocate

def reserve_little(file, offset, length):
    if os.readlink(f"/proc/self/fd/{{file}}").startswith("/dev/shm/"):
        raise OSError(28, "No space left on device")
    reserve(file, offset, length)

os.posix_fallocate = reserve_little
"""


def count_files(folder: Path) -> int:
    return len(list(folder.iterdir()))


async def test_a_dev_shm_that_is_too_small_moves_segments_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prelude = SMALL_DEV_SHM.format(room=str(tmp_path))
    monkeypatch.setattr(sys.modules[__name__], "LEARNER", prelude + LEARNER)
    learner, actor = Learner(), Actor()
    async with asyncio.TaskGroup() as tasks:
        installing = tasks.create_task(actor.installer.run(), name="installer")
        for step in range(3):
            message = learner.publish(step)
            await actor.current(message)
        installing.cancel()
    assert segment_path(message.snapshot.segment.name) is None
    assert count_files(tmp_path) >= 4
    learner.stop()
    actor.close()
    actor.assert_only_published()
