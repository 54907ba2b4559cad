"""How fast the coordinator takes trajectories in, durably, against a bare gRPC stream.

The peer is a server of the same CoordinatorService.Submit that parses each message and
acknowledges it, and does nothing else: no validation, no ledger, no sync. Ours checks
every array, decides on every trajectory, and answers once it is committed and synced.
Both run in a process of their own with one thread; clients and messages are the same.

    python benchmarks/ingest.py [--json FILE]

Names: ours_per_second, bare_per_second, ours_over_bare (medians of the repeats).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness.report import add_arguments, write

from learner.config import FleetConfig, ScheduleConfig
from learner.coordinator.actor_service import ActorService, Welcome
from learner.coordinator.core import Coordinator
from learner.coordinator.ledger import Ledger
from learner.coordinator.publications import Publications
from learner.coordinator.scheduler import Scheduler
from learner.coordinator.tasks import TaskOrder, TaskSource
from learner.coordinator.validation import Limits
from penstock import PROTOCOL, rpc
from penstock.codec import task_from_wire, trajectory_item, version_to_wire
from penstock.signals import Stop
from penstock.trajectory import FinishReason, PolicyVersion, Reward, Sampling, Trajectory, VersionSpan
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import coordinator_pb2_grpc, weights_pb2
from penstock.weights.media.zeromq import ZeromqServer

VERSION = PolicyVersion(1, 0)
DIGEST = "benchmark"
GROUP_SIZE = 16
ITEMS_PER_MESSAGE = 32


class BareServer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Parses and acknowledges."""

    async def Submit(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SubmitRequest], context: Any
    ) -> AsyncIterator[pb.SubmitResponse]:
        async for request in request_iterator:
            last = request.items[-1].sequence
            verdicts = [
                pb.Verdict(sequence=item.sequence, kind=pb.VERDICT_KIND_ACCEPTED) for item in request.items
            ]
            yield pb.SubmitResponse(acknowledged=last, verdicts=verdicts)


def serve_bare(pipe: Any) -> None:
    async def run() -> None:
        server = rpc.server()
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(BareServer(), server)
        await _serve(server, pipe)

    _run(run())


def serve_ours(pipe: Any, folder: Path, num_groups: int) -> None:
    async def run() -> None:
        ledger = Ledger(folder / "ledger.sqlite")
        schedule = ScheduleConfig(num_steps=num_groups, groups_per_step=num_groups, group_size=GROUP_SIZE)
        scheduler = Scheduler(
            schedule=schedule,
            fleet=FleetConfig(),
            sampling=Sampling(max_tokens=4096),
            tasks=TaskOrder([TaskSource(environment="words", num_tasks=0)], seed=0),
            limits=Limits(vocab_size=200_000, max_sampled_tokens=4096, max_context=8192),
            history=ledger,
        )
        scheduler.lineage.open(0, [])
        scheduler.lineage.published(VERSION, DIGEST, b"", "{}")
        weights = ZeromqServer("tcp://127.0.0.1:0")
        coordinator = Coordinator(scheduler, ledger, Stop(), run_id="benchmark")
        welcome = Welcome("benchmark", (), weights_pb2.PolicyFiles(), FleetConfig(), None)
        server = rpc.server()
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(
            ActorService(coordinator, Publications(weights), welcome), server
        )
        await _serve(server, pipe)
        totals = ledger.totals()
        assert totals.imbalance == 0
        pipe.send(totals.accepted)
        ledger.close()
        weights.close()

    _run(run())


def _run(work: Any) -> None:
    import uvloop

    uvloop.run(work)


async def _serve(server: Any, pipe: Any) -> None:
    port = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    pipe.send(port)
    await asyncio.to_thread(pipe.recv)
    await server.stop(0)


async def acquire(address: str, num_leases: int) -> tuple[str, list[pb.Lease]]:
    """Joins, and leases as many slots as there are to be sent."""
    async with rpc.channel(address) as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        request = pb.JoinRequest(actor_id="bench", protocol=PROTOCOL, engine="none", num_slots=1)
        session_id = (await stub.Join(request)).session_id
        leases: list[pb.Lease] = []
        while len(leases) < num_leases:
            answer = await stub.AcquireLeases(
                pb.AcquireLeasesRequest(
                    session_id=session_id,
                    max_leases=min(num_leases - len(leases), 1024),
                    installed=version_to_wire(VERSION),
                    installed_digest=DIGEST,
                )
            )
            assert answer.leases, answer.reason
            leases += answer.leases
        return session_id, leases


def make_messages(session_id: str, leases: list[pb.Lease], num_tokens: int) -> list[pb.SubmitRequest]:
    messages = []
    for start in range(0, len(leases), ITEMS_PER_MESSAGE):
        items = [
            make_item(lease, start + offset + 1, num_tokens)
            for offset, lease in enumerate(leases[start : start + ITEMS_PER_MESSAGE])
        ]
        messages.append(pb.SubmitRequest(session_id=session_id, items=items))
    return messages


def make_item(lease: pb.Lease, number: int, num_tokens: int) -> pb.SubmitItem:
    sampled = np.ones(num_tokens, dtype=np.uint8)
    sampled[: num_tokens // 4] = 0
    item = trajectory_item(
        Trajectory(
            trajectory_id=f"{number:032x}",
            lease_id=lease.lease_id,
            token_ids=np.arange(num_tokens, dtype=np.int32),
            loss_mask=sampled,
            logprobs=np.where(sampled == 1, np.float32(-1.0), np.float32(0.0)),
            versions=(VersionSpan(VERSION, int(sampled.sum())),),
            reward=Reward.valid(1.0),
            finish_reason=FinishReason.DONE,
            num_turns=1,
            task=task_from_wire(lease.task),
            environment_version="1",
            environment_digest="ab",
            observation_digest=str(lease.group_id),
        )
    )
    item.sequence = number
    return item


async def send(address: str, messages: list[pb.SubmitRequest]) -> float:
    """Seconds from the first message to the last acknowledgement."""
    num_items = sum(len(message.items) for message in messages)
    async with rpc.channel(address) as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)

        async def requests() -> AsyncIterator[pb.SubmitRequest]:
            for message in messages:
                yield message

        began = time.perf_counter()
        async for answer in stub.Submit(requests()):
            kinds = {verdict.kind for verdict in answer.verdicts}
            assert kinds == {pb.VERDICT_KIND_ACCEPTED}, answer.verdicts[0]
            if answer.acknowledged == num_items:
                break
        return time.perf_counter() - began


@contextlib.contextmanager
def process(target: Any, *arguments: Any) -> Iterator[tuple[str, Any]]:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.Process(target=target, args=(theirs, *arguments))
    child.start()
    try:
        yield f"127.0.0.1:{ours.recv()}", ours
    finally:
        ours.send("stop")
        child.join(timeout=60)


def measure(num_trajectories: int, num_tokens: int) -> tuple[float, float]:
    """(ours, bare), trajectories a second."""
    with tempfile.TemporaryDirectory() as folder:
        num_groups = num_trajectories // GROUP_SIZE
        with process(serve_ours, Path(folder), num_groups) as (address, pipe):
            session_id, leases = asyncio.run(acquire(address, num_trajectories))
            messages = make_messages(session_id, leases, num_tokens)
            ours = num_trajectories / asyncio.run(send(address, messages))
            pipe.send("stop")
            assert pipe.recv() == num_trajectories
    with process(serve_bare) as (address, _):
        bare = num_trajectories / asyncio.run(send(address, messages))
    return ours, bare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-trajectories", type=int, default=16_384)
    parser.add_argument("--num-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    add_arguments(parser)
    arguments = parser.parse_args()
    pairs = [measure(arguments.num_trajectories, arguments.num_tokens) for _ in range(arguments.repeats)]
    results = {
        "ours_per_second": statistics.median(ours for ours, _ in pairs),
        "bare_per_second": statistics.median(bare for _, bare in pairs),
        "ours_over_bare": statistics.median(ours / bare for ours, bare in pairs),
    }
    write(results, arguments)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
