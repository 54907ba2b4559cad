"""The real actor around a scripted engine: what it generates is a function of its lease, or is of a set length.

    python -m tests.faults.scripted_actor ADDRESS --name NAME --history FILE

Sessions, leases, heartbeats, weight fetches, the spool and draining are the code that
`penstock actor` runs. Only the tokens are scripted: a rollout takes as many ticks as
`Script` says, counts a token a tick, and stamps each with the version then installed.
No torch, so that hundreds fit into one process. With `asks=True` the rollouts are real
too: turns of `max_tokens` tokens, played against the run's environment servers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from actors.engines.base import EngineStats, GenerationChunk, GenerationRequest, InstallReport, StopReason
from actors.install import Installer
from actors.render import Renderer
from actors.rollout import Player, Progress
from actors.service import Actor
from actors.session import Identity, Session
from actors.uplink import Uplink
from environments.client import EnvironmentClient
from penstock import PROTOCOL
from penstock.errors import EngineFault, EnvironmentFault
from penstock.history import History
from penstock.rpc import to_seconds
from penstock.signals import Stop
from penstock.tasks import task_group
from penstock.trajectory import FinishReason, Lease, PolicyVersion, Reward, Task, Trajectory, run_length
from penstock.v1.coordinator_pb2 import JoinResponse
from penstock.waits import Waits
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import WeightsMedium
from penstock.weights.media.collective import CollectiveReceiver
from penstock.weights.media.shared_memory import SharedMemoryReceiver
from penstock.weights.media.zeromq import ZeromqReceiver
from penstock.weights.staged import StagedWeights

NUM_PROMPT_TOKENS = 2


def fixed(num_tokens: int) -> Callable[[Lease], int]:
    return lambda lease: num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What rollouts are like."""

    num_tokens: Callable[[Lease], int] = field(default_factory=lambda: fixed(4))
    token_seconds: float = 0.002
    """A rollout of n tokens takes n times as long."""
    token_bytes: int = 1
    """Copies of each token, for trajectories that weigh something."""
    fault: Callable[[Lease], EnvironmentFault | EngineFault | None] = field(
        default_factory=lambda: lambda lease: None
    )
    """Raised instead of a trajectory."""
    install_seconds: float = 0.0
    hoard_bytes: int = 0
    """Memory that each token takes and never gives back."""


def trajectory_of(
    lease: Lease, versions: list[PolicyVersion], *, author: str = "", copies: int = 1
) -> Trajectory:
    """Two prompt tokens, then the sampled ones: a function of the lease, and of who made it."""
    num_sampled = len(versions) * copies
    digest = hashlib.sha256(f"{author}/{lease.lease_id}".encode()).hexdigest()
    num_tokens = NUM_PROMPT_TOKENS + num_sampled
    mask = np.ones(num_tokens, dtype=np.uint8)
    mask[:NUM_PROMPT_TOKENS] = 0
    return Trajectory(
        trajectory_id=digest[:32],
        lease_id=lease.lease_id,
        token_ids=(np.arange(num_tokens) % 7 + lease.slot % 3).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask == 1, np.float32(-1.5), np.float32(0.0)).astype(np.float32),
        versions=run_length([version for version in versions for _ in range(copies)]),
        reward=Reward.valid(float(lease.slot % 2)),
        finish_reason=FinishReason.DONE,
        num_turns=1,
        task=lease.task,
        environment_version="1",
        environment_digest="ab",
        observation_digest=observation_of(lease.task),
    )


def observation_of(task: Task) -> str:
    return hashlib.sha256(repr(task).encode()).hexdigest()


def token_of(version: PolicyVersion) -> int:
    """What the scripted engine samples under a version."""
    return 1 + version.step % 7


class ScriptedEngine:
    """Holds versions, and generates nothing by itself."""

    num_slots = 8
    max_context = 1_000_000
    verifies = False

    def __init__(self, script: Script) -> None:
        self._script = script
        self.installed: PolicyVersion | None = None
        self.num_tokens = 0
        self.num_installs = 0

    async def start(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        """As many tokens as the request allows, one a tick. Each tells which version it is of."""
        last = request.sampling.max_tokens - 1
        for number in range(last + 1):
            await asyncio.sleep(self._script.token_seconds)
            assert self.installed is not None
            self.num_tokens += 1
            yield GenerationChunk(
                token_ids=(token_of(self.installed),),
                logprobs=(-1.5,),
                version=self.installed,
                stop_reason=StopReason.LENGTH if number == last else None,
            )

    async def install(self, staged: StagedWeights) -> InstallReport:
        await asyncio.sleep(self._script.install_seconds)
        self.installed = staged.manifest.version
        self.num_installs += 1
        return InstallReport(
            version=staged.manifest.version,
            digest=staged.manifest.digest,
            pause_seconds=0.0,
            tensors_seconds=0.0,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=0,
            num_waiting=0,
            num_tokens=self.num_tokens,
            tokens_per_second=0.0,
            num_installs=self.num_installs,
            max_install_seconds=0.0,
        )

    async def stop(self) -> None: ...


class ScriptedPlayer:
    """Plays a lease by the clock."""

    def __init__(self, engine: ScriptedEngine, script: Script, author: str) -> None:
        self._engine = engine
        self._script = script
        self._author = author
        self.lengths: list[int] = []
        """Of every rollout that came to its end."""
        self._hoard: list[bytes] = []

    async def play(self, lease: Lease, session_id: str, progress: Progress) -> Trajectory:
        versions: list[PolicyVersion] = []
        fault = self._script.fault(lease)
        num_tokens = self._script.num_tokens(lease)
        for _ in range(num_tokens):
            await asyncio.sleep(self._script.token_seconds)
            assert self._engine.installed is not None
            versions.append(self._engine.installed)
            progress.num_tokens += 1
            self._hoard.append(b"x" * self._script.hoard_bytes)
            self._engine.num_tokens += 1
        if fault is not None:
            raise fault
        progress.num_turns += 1
        self.lengths.append(num_tokens)
        return trajectory_of(lease, versions, author=self._author, copies=self._script.token_bytes)


class Alphabet:
    """A tokeniser of a handful of letters."""

    chat_template = None
    eos_token_id = 0
    eos_token = ""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(character) % 7 for character in text]}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + token_id) for token_id in token_ids)


class AnyEnvironment(dict[str, ScriptedPlayer]):
    """One player for whatever environment a lease names."""

    def __init__(self, player: ScriptedPlayer) -> None:
        super().__init__()
        self._player = player

    def get(self, key: str, default: object = None) -> ScriptedPlayer:  # type: ignore[override]
        return self._player


class ScriptedActor:
    """One actor in this process. Run `run`; cancelling it is as sudden as SIGKILL to the learner."""

    def __init__(
        self,
        address: str,
        name: str,
        history: Path,
        *,
        script: Script,
        num_slots: int = 8,
        asks: bool = False,
        groups: CollectiveReceiver | None = None,
    ) -> None:
        """groups: that versions are broadcast to; without any, versions are pulled."""
        self.name = name
        self._groups = groups
        self.engine = ScriptedEngine(script)
        self.engine.num_slots = num_slots
        self.player = ScriptedPlayer(self.engine, script, name)
        self.stop = Stop()
        self.actor: Actor | None = None
        self._address = address
        self._history = history
        self._num_slots = num_slots
        self._asks = asks

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            await (await self._join(stack)).run()

    async def _join(self, stack: contextlib.AsyncExitStack) -> Actor:
        history = History(self._history)
        stack.callback(history.close)
        identity = Identity(
            actor_id=self.name,
            engine="scripted",
            num_slots=self._num_slots,
            address="",
            hostname="localhost",
            pid=os.getpid(),
            device="cpu",
            weights_medium=WeightsMedium.COLLECTIVE if self._groups else WeightsMedium.PULL,
        )
        session = Session(
            self._address,
            identity,
            self.stop,
            protocol=PROTOCOL,
            patience_seconds=120.0,
            held_leases=lambda: self.actor.held_leases() if self.actor else [],
            installed=lambda: self.actor.installed if self.actor else None,
        )
        stack.push_async_callback(session.close)
        welcome = await session.join(connect_seconds=60.0)
        own = () if self._groups is None else (self._groups,)
        fetcher = WeightFetcher((SharedMemoryReceiver(), ZeromqReceiver(), *own))
        stack.callback(fetcher.close)
        waits = Waits()
        players: Any = AnyEnvironment(self.player)
        if self._asks:
            players = await self._players(welcome, waits, stack)
        self.actor = Actor(
            session=session,
            engine=self.engine,
            installer=Installer(self.engine, fetcher),
            uplink=Uplink(session, welcome.credits, max_bytes=64 * 1024 * 1024, history=history),
            players=players,
            run_id=welcome.run_id,
            heartbeat_seconds=to_seconds(welcome.heartbeat_interval),
            stop=self.stop,
            stream_tokens=welcome.stream_tokens,
            waits=waits,
            groups=self._groups,
        )
        return self.actor

    async def _players(
        self, welcome: JoinResponse, waits: Waits, stack: contextlib.AsyncExitStack
    ) -> dict[str, Player]:
        """Those that `penstock actor` has, around this engine and its letters."""
        renderer = Renderer(Alphabet())  # type: ignore[arg-type]
        players = {}
        for endpoint in welcome.environments:
            client = EnvironmentClient(
                endpoint.address,
                reset_timeout_seconds=to_seconds(welcome.reset_timeout),
                step_timeout_seconds=to_seconds(welcome.step_timeout),
            )
            await stack.enter_async_context(client)
            players[endpoint.name] = Player(self.engine, renderer, client, waits=waits)
        return players


async def _run(arguments: argparse.Namespace) -> None:
    script = Script(
        num_tokens=fixed(arguments.num_tokens),
        token_seconds=arguments.token_seconds,
        hoard_bytes=arguments.hoard_bytes,
    )
    actor = ScriptedActor(
        arguments.address,
        arguments.name,
        arguments.history,
        script=script,
        asks=arguments.asks,
        groups=CollectiveReceiver(host="127.0.0.1", device="cpu") if arguments.groups else None,
    )
    actor.stop.on_signals()
    async with task_group() as tasks:
        tasks.create_task(actor.run(), name=arguments.name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--name", required=True)
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--num-tokens", type=int, default=4)
    parser.add_argument("--token-seconds", type=float, default=0.002)
    parser.add_argument("--hoard-bytes", type=int, default=0)
    parser.add_argument("--asks", action="store_true")
    parser.add_argument("--groups", action="store_true")
    uvloop.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
