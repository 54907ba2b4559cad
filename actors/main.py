"""`penstock actor`: generates for a learner, until it is stopped or the run is finished."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvloop
from transformers import AutoTokenizer

from actors.engines.base import Engine
from actors.engines.choose import choose_device, choose_engine, make_engine
from actors.engines.names import EngineChoice
from actors.install import Installer
from actors.operator_service import SERVICE, ActorOperatorService
from actors.render import Renderer
from actors.rollout import Player
from actors.service import Actor
from actors.session import Identity, Session
from actors.uplink import Uplink
from environments.client import EnvironmentClient
from penstock import PROTOCOL, config, log, rpc
from penstock.codec import install_mode_from_wire
from penstock.errors import ConfigError
from penstock.history import History
from penstock.memory import collect_rarely, keep_chunks
from penstock.policy_files import write_policy_files
from penstock.rpc import to_seconds
from penstock.signals import Stop
from penstock.v1 import actor_pb2_grpc
from penstock.v1 import coordinator_pb2 as pb
from penstock.waits import Waits
from penstock.watchdog import Watchdog
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import WeightsMedium
from penstock.weights.media.collective import CollectiveReceiver
from penstock.weights.media.shared_memory import SharedMemoryReceiver
from penstock.weights.media.zeromq import ZeromqReceiver
from penstock.weights.neighbours import Neighbours

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorConfig:
    learner: str = "127.0.0.1:7070"
    """HOST:PORT of the learner. All else comes with the join."""
    name: str = ""
    """Unique in the run; empty makes one from the host's name."""
    engine: EngineChoice = "torch"
    """vllm, torch (every causal LM, any device), or auto: vllm if it is installed and the device is a GPU."""
    num_slots: int = 32
    """Sequences decoded at once."""
    max_context: int | None = None
    """Tokens that prompt and completion may hold together; by default the policy's own limit."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes cuda if there is one."""
    tensor_parallel_size: int = 1
    """GPUs that share each layer (vllm)."""
    pipeline_parallel_size: int = 1
    """Groups of such GPUs that share the layers (vllm)."""
    data_parallel_size: int = 1
    """Copies of the policy, each on GPUs of its own, that share `num_slots` (vllm)."""
    bind: str = "127.0.0.1:0"
    """Where this actor answers operators; port 0 takes a free one."""
    insecure: bool = False
    """Allow a `bind` beyond loopback although nothing authenticates who connects."""
    weights_medium: WeightsMedium = WeightsMedium.AUTO
    """How versions come: auto, as the run's `weights.medium` says; pull, never by broadcast; collective, by
    broadcast too, whatever this actor's device and host. Beyond loopback broadcasts need `insecure`."""
    connect_seconds: float = 60.0
    """How long to try to reach the learner before giving up."""
    patience_seconds: float = 600.0
    """How long the learner may be away in mid-run before giving up."""
    spool_bytes: int = 256 * 1024 * 1024
    """Finished work kept while the learner is away. Rollouts wait when it is full."""
    history: Path | None = None
    """Append what is sent and acknowledged to this file, for `penstock chaos` and post-mortems."""

    def __post_init__(self) -> None:
        positive = (
            "num_slots", "connect_seconds", "patience_seconds", "spool_bytes",
            "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.weights_medium is WeightsMedium.COLLECTIVE and self.may_broadcast is WeightsMedium.PULL:
            raise ConfigError(
                f"weights_medium is collective, but {self.learner} is not a loopback address, and nothing would "
                "authenticate who connects: pass --insecure true on a network that you trust, or use pull"
            )

    @property
    def may_broadcast(self) -> WeightsMedium:
        """What the learner is asked for: members of a group listen for each other."""
        return self.weights_medium if self.insecure or rpc.is_loopback(self.learner) else WeightsMedium.PULL


def main(argv: Sequence[str]) -> int:
    log.configure()
    settings = config.load(ActorConfig, argv, prog="penstock actor", description=__doc__ or "")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    uvloop.run(_run(settings))
    return 0


async def _run(settings: ActorConfig) -> None:
    stop = Stop()
    stop.on_signals()
    name = settings.name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    operators = ActorOperatorService(name, stop)
    with Watchdog() as watchdog:
        async with contextlib.AsyncExitStack() as stack:
            address = await stack.enter_async_context(_served(operators, settings))
            actor = await _join(settings, name, address, stop, stack)
            operators.actor = actor
            keep_chunks()
            collect_rarely()
            print(f"actor {name} joined {settings.learner}", flush=True)  # noqa: T201
            await actor.run(watchdog)
    _log.info("left: %s", stop.reason)


async def _join(
    settings: ActorConfig, name: str, address: str, stop: Stop, stack: contextlib.AsyncExitStack
) -> Actor:
    """Joins the learner and makes everything that its answer asks for."""
    device = choose_device(settings.device)
    engine_name = choose_engine(settings.engine, device)
    identity = Identity(
        actor_id=name,
        engine=engine_name,
        num_slots=settings.num_slots,
        address=address,
        hostname=socket.gethostname(),
        pid=os.getpid(),
        device=device,
        weights_medium=settings.may_broadcast,
    )
    actor: Actor | None = None
    session = Session(
        settings.learner,
        identity,
        stop,
        protocol=PROTOCOL,
        patience_seconds=settings.patience_seconds,
        held_leases=lambda: actor.held_leases() if actor else [],
        installed=lambda: actor.installed if actor else None,
    )
    stack.push_async_callback(session.close)
    welcome = await session.join(connect_seconds=settings.connect_seconds)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-policy-")))
    write_policy_files(folder, welcome.policy_files, await session.policy_files())
    engine = make_engine(
        engine_name,
        folder,
        device=device,
        num_slots=settings.num_slots,
        max_context=settings.max_context,
        install_mode=install_mode_from_wire(welcome.install_mode),
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        data_parallel_size=settings.data_parallel_size,
    )
    stack.push_async_callback(engine.stop)
    host, _ = rpc.split_address(settings.learner)
    groups = CollectiveReceiver(host=host, device=device)
    receivers = (SharedMemoryReceiver(), ZeromqReceiver(host=host), groups)
    fetcher = WeightFetcher(receivers, neighbours=Neighbours())
    stack.callback(fetcher.close)
    history = History(settings.history) if settings.history else None
    if history is not None:
        stack.callback(history.close)
    waits = Waits()
    players = await _players(welcome, engine, folder, waits, stack)
    actor = Actor(
        session=session,
        engine=engine,
        installer=Installer(engine, fetcher),
        uplink=Uplink(session, welcome.credits, max_bytes=settings.spool_bytes, history=history),
        players=players,
        run_id=welcome.run_id,
        heartbeat_seconds=to_seconds(welcome.heartbeat_interval),
        stop=stop,
        stream_tokens=welcome.stream_tokens,
        waits=waits,
        groups=groups,
    )
    return actor


async def _players(
    welcome: pb.JoinResponse, engine: Engine, folder: Path, waits: Waits, stack: contextlib.AsyncExitStack
) -> dict[str, Player]:
    renderer = Renderer(AutoTokenizer.from_pretrained(folder))
    truncation = welcome.truncation_reward if welcome.HasField("truncation_reward") else None
    players = {}
    for endpoint in welcome.environments:
        client = await stack.enter_async_context(
            EnvironmentClient(
                endpoint.address,
                reset_timeout_seconds=to_seconds(welcome.reset_timeout),
                step_timeout_seconds=to_seconds(welcome.step_timeout),
            )
        )
        players[endpoint.name] = Player(engine, renderer, client, truncation_reward=truncation, waits=waits)
    return players


@contextlib.asynccontextmanager
async def _served(operators: ActorOperatorService, settings: ActorConfig) -> AsyncIterator[str]:
    """Serves operators; yields the address."""
    server = rpc.server()
    actor_pb2_grpc.add_ActorServiceServicer_to_server(operators, server)
    rpc.add_standard_services(server, (SERVICE,))
    port = rpc.bind(server, settings.bind, insecure=settings.insecure)
    async with rpc.serving(server, grace_seconds=0.5):
        yield rpc.join_address(rpc.split_address(settings.bind)[0], port)
