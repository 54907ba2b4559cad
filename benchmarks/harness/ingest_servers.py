"""The servers that benchmarks/ingest.py sends trajectories to, each in a process of its own.

Three answer the same messages on the same kind of stream, with as many bytes:

- `serve_bytes` hands them over as gRPC received them, unread;
- `serve_parsed` parses each with protobuf, and reads nothing but its items' numbers;
- `serve_coordinator` is a coordinator with its ledger: it checks, decides, commits, syncs.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import resource
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import uvloop

from learner.config import BreakerConfig, FleetConfig, ScheduleConfig, WeightsConfig
from learner.coordinator.actor_service import ActorService, Welcome
from learner.coordinator.broadcasts import Broadcasts
from learner.coordinator.core import Coordinator
from learner.coordinator.ledger import Ledger
from learner.coordinator.publications import Publications
from learner.coordinator.scheduler import Scheduler
from learner.coordinator.tasks import TaskOrder, TaskSource
from learner.coordinator.validation import Limits
from penstock import rpc
from penstock.memory import collect_rarely, keep_arrays
from penstock.signals import Stop
from penstock.trajectory import PolicyVersion, Sampling
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import coordinator_pb2_grpc, weights_pb2
from penstock.weights.manifest import WeightsMedium
from penstock.weights.media.zeromq import ZeromqServer

VERSION = PolicyVersion(1, 0)
DIGEST = "benchmark"
GROUP_SIZE = 16
ITEMS_PER_MESSAGE = 32
SUBMIT = "/penstock.v1.CoordinatorService/Submit"
_FLEET = FleetConfig(suspect_seconds=60.0, dead_seconds=120.0)
"""A thousand actors are one process here, whose heartbeats are late when the machine has other work."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the server's process has used since it began to serve."""

    cpu_seconds: float
    peak_rss_mb: float


class Server:
    """A server's process, as the benchmark sees it."""

    def __init__(self, address: str, pipe: Connection) -> None:
        self.address = address
        self._pipe = pipe

    def usage(self) -> Usage:
        self._pipe.send("usage")
        found: Usage = self._pipe.recv()
        return found


@contextlib.contextmanager
def process(target: Any, *arguments: Any) -> Iterator[Server]:
    """Starts a server, and ends it. Raises RuntimeError if the server failed."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.Process(target=target, args=(theirs, *arguments))
    child.start()
    try:
        yield Server(f"127.0.0.1:{ours.recv()}", ours)
    finally:
        ours.send("stop")
        child.join(timeout=60)
    if child.exitcode != 0:
        raise RuntimeError(f"the server's process ended with {child.exitcode}")


def serve_bytes(pipe: Connection) -> None:
    """The bare stream: bytes in, the bytes of an answer out."""

    async def submit(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        number = 0
        async for _ in requests:
            number += 1
            yield _answer(number * ITEMS_PER_MESSAGE)

    async def run() -> None:
        server = rpc.server()
        handler = grpc.stream_stream_rpc_method_handler(submit)
        _, service, method = SUBMIT.split("/")
        generic = grpc.method_handlers_generic_handler(service, {method: handler})
        server.add_generic_rpc_handlers((generic,))
        await _serve(server, pipe)

    _run(run())


def serve_parsed(pipe: Connection) -> None:
    """What any service written with generated code pays before its first line."""

    class Parsing(coordinator_pb2_grpc.CoordinatorServiceServicer):
        async def Submit(  # noqa: N802
            self, request_iterator: AsyncIterator[pb.SubmitRequest], context: Any
        ) -> AsyncIterator[pb.SubmitResponse]:
            async for request in request_iterator:
                verdicts = [
                    pb.Verdict(sequence=item.sequence, kind=pb.VERDICT_KIND_ACCEPTED)
                    for item in request.items
                ]
                yield pb.SubmitResponse(acknowledged=verdicts[-1].sequence, verdicts=verdicts)

    async def run() -> None:
        server = rpc.server()
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(Parsing(), server)
        await _serve(server, pipe)

    _run(run())


def serve_coordinator(pipe: Connection, folder: Path, num_trajectories: int) -> None:
    """The coordinator, as its program runs it, with room for `num_trajectories` leases."""
    _run(_coordinate(pipe, folder, num_trajectories))


async def _coordinate(pipe: Connection, folder: Path, num_trajectories: int) -> None:
    ledger = Ledger(folder / "ledger.sqlite")
    num_groups = -(-num_trajectories // GROUP_SIZE)
    scheduler = Scheduler(
        schedule=ScheduleConfig(num_steps=2, groups_per_step=num_groups, group_size=GROUP_SIZE),
        fleet=_FLEET,
        breaker=BreakerConfig(),
        sampling=Sampling(max_tokens=4096),
        tasks=TaskOrder([TaskSource(environment="words", num_tasks=0)], seed=0),
        limits=Limits(vocab_size=200_000, max_sampled_tokens=4096, max_context=8192),
        history=ledger,
    )
    scheduler.lineage.open(0, [])
    scheduler.lineage.published(VERSION, DIGEST, b"", "{}")
    weights = ZeromqServer("tcp://127.0.0.1:0")
    stop = Stop()
    coordinator = Coordinator(scheduler, ledger, stop, run_id="benchmark")
    broadcasts = Broadcasts(
        coordinator, WeightsConfig(medium=WeightsMedium.PULL), host="127.0.0.1", device="cpu"
    )
    welcome = Welcome("benchmark", (), weights_pb2.PolicyFiles(), _FLEET, None)
    server = rpc.server(max_calls_per_connection=rpc.MAX_CALLS_PER_CONNECTION)
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(
        ActorService(coordinator, Publications(weights), broadcasts, welcome), server
    )
    keep_arrays()
    collect_rarely()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(coordinator.tick_forever(), name="tick")
        tasks.create_task(coordinator.commit_ticks(), name="commit-ticks")
        await _serve(server, pipe)
        stop.set("the benchmark is over")
    assert ledger.totals().imbalance == 0
    ledger.close()
    weights.close()


def _answer(acknowledged: int) -> bytes:
    verdicts = [
        pb.Verdict(sequence=acknowledged - behind, kind=pb.VERDICT_KIND_ACCEPTED)
        for behind in reversed(range(ITEMS_PER_MESSAGE))
    ]
    return pb.SubmitResponse(acknowledged=acknowledged, verdicts=verdicts).SerializeToString()


def _run(work: Coroutine[Any, Any, None]) -> None:
    uvloop.run(work)


async def _serve(server: grpc.aio.Server, pipe: Connection) -> None:
    port = rpc.bind(server, "127.0.0.1:0")
    async with rpc.serving(server, grace_seconds=0):
        began = _cpu_seconds()
        pipe.send(port)
        while await asyncio.to_thread(pipe.recv) == "usage":
            pipe.send(Usage(_cpu_seconds() - began, _peak_rss_mb()))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_rss_mb() -> float:
    """Of this process's own memory: getrusage would tell its parent's peak, where that is larger."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024
