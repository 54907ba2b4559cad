"""The vLLM engine passes the suite that every engine passes, and keeps to what is its own.

Starting vLLM takes the better part of a minute, so tests of equal policies share an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from actors.engines.base import Engine
from actors.engines.vllm import VllmEngine
from actors.install import Installer
from penstock.codec import manifest_to_wire
from penstock.errors import ConfigError, WeightTransferError
from penstock.trajectory import InstallMode, PolicyVersion
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import HostTensor, Manifest
from penstock.weights.media.shared_memory import SharedMemoryReceiver
from penstock.weights.segment import SegmentRing
from penstock.weights.staged import StagedWeights
from tests.conformance.engine_suite import (
    FIRST,
    SECOND,
    TOLERANCE,
    EngineSuite,
    complete,
    prompt,
    request,
    until,
)
from tests.conformance.policies import MAX_CONTEXT, Policy, configs, host_tensors, write_policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed; `make setup-vllm` installs it"
)

_FEW_SLOTS = 1
_MANY_SLOTS = 8

_PROGRAM = """
import asyncio, sys
from pathlib import Path
from actors.engines.vllm import VllmEngine

async def main():
    await VllmEngine(Path(sys.argv[1]), num_slots=1, max_context=64).start()
    print("started", flush=True)
    await asyncio.sleep(3600)

if __name__ == "__main__":
    asyncio.run(main())
"""

_KILLED_IN_MID_INSTALL = """
import asyncio, os, signal, sys
from pathlib import Path
from actors.engines.placement import Placement
from actors.engines.vllm import VllmEngine
from actors.policy_weights import stage_policy
from penstock.trajectory import PolicyVersion

def write_half(self, staged, names, segment):
    segment[: len(segment) // 2] = 77
    print("preparing", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    engine = VllmEngine(Path(sys.argv[1]), num_slots=1, max_context=64)
    await engine.start()
    Placement.write = write_half
    await engine.install(stage_policy(Path(sys.argv[2]), PolicyVersion(1, 1)))

if __name__ == "__main__":
    asyncio.run(main())
"""


class _OverwritingFetcher(WeightFetcher):
    """Has the trainer publish other tensors in the place of the first version that is fetched."""

    def __init__(self, ring: SegmentRing, others: Sequence[HostTensor]) -> None:
        super().__init__([SharedMemoryReceiver()])
        self.num_overwritten = 0
        self._ring = ring
        self._others = others

    def fetch(self, manifest: Manifest, **arguments: Any) -> StagedWeights:
        staged = super().fetch(manifest, **arguments)
        if not self.num_overwritten:
            assert not staged.verified
            for step in (2, 3):
                self._ring.write(PolicyVersion(1, step), self._others)
            self.num_overwritten += 1
        return staged


_engines: dict[tuple[str, int, InstallMode], Engine] = {}
"""Engines that have installed a version, by configuration, number of slots and mode."""


# Weights of a seed of their own are in no segment that the engines of this module share.


@pytest.mark.asyncio(loop_scope="class")
class TestVllmEngine(EngineSuite):
    unsupported = {"qwen3-moe": "vLLM packs the weights of experts on CPUs"}  # noqa: RUF012

    @pytest_asyncio.fixture(scope="class", loop_scope="class", autouse=True)
    @classmethod
    async def engines(cls) -> AsyncIterator[None]:
        yield
        while _engines:
            await _engines.popitem()[1].stop()

    def make_engine(
        self, folder: Path, *, num_slots: int, max_context: int, install_mode: InstallMode = InstallMode.KEEP
    ) -> Engine:
        return VllmEngine(
            folder,
            num_slots=num_slots,
            max_context=max_context,
            install_mode=install_mode,
            stream_tokens=1,
        )

    @contextlib.asynccontextmanager
    async def running(
        self,
        policy: Policy,
        *,
        num_slots: int = 8,
        max_context: int = MAX_CONTEXT,
        install_mode: InstallMode = InstallMode.KEEP,
        install: bool = True,
    ) -> AsyncIterator[Engine]:
        """An engine with as few or as many slots; with the policy's own limit whatever is asked for."""
        if not install:
            async with super().running(policy, num_slots=num_slots, install=False) as engine:
                yield engine
            return
        num_slots = _FEW_SLOTS if num_slots <= 2 else _MANY_SLOTS
        key = (policy.model.config.to_json_string(), num_slots, install_mode)
        if key not in _engines:
            engine = self.make_engine(
                policy.folder, num_slots=num_slots, max_context=MAX_CONTEXT, install_mode=install_mode
            )
            await engine.start()
            _engines[key] = engine
        await _engines[key].install(policy.stage(FIRST))
        yield _engines[key]

    async def test_no_cache_of_an_older_version_is_read(self, qwen: Policy) -> None:
        ids = prompt(400)
        async with self.running(qwen) as engine:
            for step, version in enumerate((FIRST, SECOND)):
                qwen.perturb(seed=step)
                await engine.install(qwen.stage(version))
                for _ in range(2):
                    done = await complete(engine, request(ids, max_tokens=20, seed=1))
                    assert done.logprobs == pytest.approx(qwen.logprobs(ids, done.token_ids), abs=TOLERANCE)

    async def test_what_waits_through_an_install_reads_no_cache_of_before(self, qwen: Policy) -> None:
        new = write_policy(qwen.folder, qwen.model.config, seed=1)
        ids = prompt(300)
        async with self.running(qwen, num_slots=1) as engine, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(complete(engine, request(ids, max_tokens=200, seed=1 + index)))
                for index in range(3)
            ]
            before = engine.stats().num_tokens
            await until(lambda: engine.stats().num_tokens > before)
            await engine.install(new.stage(SECOND))
        begun_after = [task.result() for task in tasks if task.result().spans == [(SECOND, 200)]]
        assert len(begun_after) == 2
        for done in begun_after:
            assert done.logprobs == pytest.approx(new.logprobs(ids, done.token_ids), abs=TOLERANCE)

    async def test_a_policy_whose_weights_are_packed_is_refused(self, tmp_path: Path) -> None:
        policy = write_policy(tmp_path / "policy", configs()["qwen3-moe"])
        engine = self.make_engine(policy.folder, num_slots=1, max_context=64)
        with pytest.raises(ConfigError, match="in place"):
            await engine.start()
        await engine.stop()

    async def test_an_install_of_corrupt_weights_changes_nothing_and_may_be_tried_again(
        self, qwen: Policy
    ) -> None:
        new = write_policy(qwen.folder, qwen.model.config, seed=10)
        good = new.stage(SECOND)
        buffer = good.buffer.copy()
        buffer[good.manifest.tensors[-1].offset] ^= 1
        corrupt = dataclasses.replace(good, buffer=buffer, verified=False)
        ids = prompt(9)
        async with self.running(qwen) as engine:
            with pytest.raises(WeightTransferError, match="digest"):
                await engine.install(corrupt)
            assert engine.installed == FIRST
            done = await complete(engine, request(ids, max_tokens=10))
            assert done.spans == [(FIRST, 10)]
            assert done.logprobs == pytest.approx(qwen.logprobs(ids, done.token_ids), abs=TOLERANCE)
            await engine.install(good)
            done = await complete(engine, request(ids, max_tokens=10))
            assert done.logprobs == pytest.approx(new.logprobs(ids, done.token_ids), abs=TOLERANCE)

    async def test_weights_that_the_trainer_overwrites_in_mid_install_are_refused_and_fetched_again(
        self, qwen: Policy
    ) -> None:
        """By the installer and the fetcher of a real actor, from the trainer's own memory."""
        new = write_policy(qwen.folder, qwen.model.config, seed=11)
        ring = SegmentRing(name_prefix=f"penstock-test-{os.getpid()}", num_segments=2)
        fetcher = _OverwritingFetcher(ring, host_tensors(qwen.model))
        async with self.running(qwen) as engine, asyncio.TaskGroup() as group:
            installer = Installer(engine, fetcher)
            running = group.create_task(installer.run())
            installer.announce(manifest_to_wire(ring.write(SECOND, host_tensors(new.model))))
            await until(lambda: fetcher.num_overwritten == 1)
            assert installer.installed is None, "an overwritten version was confirmed"
            newest = ring.write(PolicyVersion(1, 9), host_tensors(new.model))
            installer.announce(manifest_to_wire(newest))
            await until(lambda: installer.installed is not None)
            assert installer.installed == (newest.version, newest.digest)
            done = await complete(engine, request(prompt(9), max_tokens=10))
            assert done.spans == [(newest.version, 10)]
            assert done.logprobs == pytest.approx(new.logprobs(prompt(9), done.token_ids), abs=TOLERANCE)
            running.cancel()
        fetcher.close()
        ring.close()

    async def test_an_actor_that_is_killed_in_mid_install_spoils_nothing_for_the_others(
        self, qwen: Policy, tmp_path: Path
    ) -> None:
        new = write_policy(qwen.folder, qwen.model.config, seed=12)
        new.model.save_pretrained(tmp_path / "second")  # type: ignore[operator]
        ids = prompt(9)
        async with self.running(qwen) as engine:
            program = tmp_path / "program.py"
            program.write_text(_KILLED_IN_MID_INSTALL)
            actor = await asyncio.create_subprocess_exec(
                sys.executable, str(program), str(qwen.folder), str(tmp_path / "second"),
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert actor.stdout is not None
            assert b"preparing\n" in await actor.stdout.read()
            assert await actor.wait() == -signal.SIGKILL
            done = await complete(engine, request(ids, max_tokens=10))
            assert done.spans == [(FIRST, 10)]
            assert done.logprobs == pytest.approx(qwen.logprobs(ids, done.token_ids), abs=TOLERANCE)
            await engine.install(new.stage(SECOND))
            done = await complete(engine, request(ids, max_tokens=10))
            assert done.spans == [(SECOND, 10)]
            assert done.logprobs == pytest.approx(new.logprobs(ids, done.token_ids), abs=TOLERANCE)

    async def test_its_processes_end_when_the_actor_is_killed(self, qwen: Policy, tmp_path: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(_PROGRAM)
        actor = await asyncio.create_subprocess_exec(
            sys.executable, str(program), str(qwen.folder), stdout=asyncio.subprocess.PIPE
        )
        assert actor.stdout is not None
        while (line := await actor.stdout.readline()) != b"started\n":
            assert line, "the engine did not start"
        children = psutil.Process(actor.pid).children(recursive=True)
        assert len(children) >= 2
        actor.kill()
        await actor.wait()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=60)
        assert not alive


def test_the_turns_of_an_episode_have_one_seed_and_draw_other_numbers() -> None:
    from actors.engines.vllm_host import _sampling

    first, again, later = (_sampling(request(prompt(length), seed=7), 8, [], 16).seed for length in (4, 4, 9))
    assert first == again != later
    assert _sampling(request(prompt(4)), 8, [], 16).seed is None
