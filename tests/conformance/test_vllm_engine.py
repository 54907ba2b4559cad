"""The vLLM engine passes the suite that every engine passes, and keeps to what is its own.

Starting vLLM takes the better part of a minute, so tests of equal policies share an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from actors.engines.base import Engine
from actors.engines.vllm import VllmEngine
from penstock.errors import ConfigError
from tests.conformance.engine_suite import FIRST, SECOND, TOLERANCE, EngineSuite, complete, prompt, request
from tests.conformance.policies import MAX_CONTEXT, Policy, configs, write_policy

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

_engines: dict[tuple[str, int], Engine] = {}
"""Engines that have installed a version, by configuration and number of slots."""


@pytest.mark.asyncio(loop_scope="class")
class TestVllmEngine(EngineSuite):
    unsupported = {"qwen3-moe": "vLLM packs the weights of experts on CPUs"}  # noqa: RUF012

    @pytest_asyncio.fixture(scope="class", loop_scope="class", autouse=True)
    @classmethod
    async def engines(cls) -> AsyncIterator[None]:
        yield
        while _engines:
            await _engines.popitem()[1].stop()

    def make_engine(self, folder: Path, *, num_slots: int, max_context: int) -> Engine:
        return VllmEngine(folder, num_slots=num_slots, max_context=max_context, stream_tokens=1)

    @contextlib.asynccontextmanager
    async def running(
        self, policy: Policy, *, num_slots: int = 8, max_context: int = MAX_CONTEXT, install: bool = True
    ) -> AsyncIterator[Engine]:
        """An engine with as few or as many slots; with the policy's own limit whatever is asked for."""
        if not install:
            async with super().running(policy, num_slots=num_slots, install=False) as engine:
                yield engine
            return
        num_slots = _FEW_SLOTS if num_slots <= 2 else _MANY_SLOTS
        key = (policy.model.config.to_json_string(), num_slots)
        if key not in _engines:
            engine = self.make_engine(policy.folder, num_slots=num_slots, max_context=MAX_CONTEXT)
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

    async def test_a_policy_whose_weights_are_packed_is_refused(self, tmp_path: Path) -> None:
        policy = write_policy(tmp_path / "policy", configs()["qwen3-moe"])
        engine = self.make_engine(policy.folder, num_slots=1, max_context=64)
        with pytest.raises(ConfigError, match="in place"):
            await engine.start()
        await engine.stop()

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
