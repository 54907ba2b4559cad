"""What the calls of a rollout cost: over one stream, many to a message, and as single RPCs.

Rollouts of one turn (reset, step, close), 128 at a time, against a server that answers at
once, in this process; in processor time of both sides, in turn.

    python benchmarks/environment_calls.py [--rounds 5] [--json FILE]

Names: single_over_stream, stream_us, single_us (of one rollout, medians).
"""

# ruff: noqa: N802  the methods' names are the contract's

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from harness.report import add_arguments, write

from environments import wire
from environments.base import Message
from environments.client import EnvironmentClient
from environments.streams import Calls, Handlers
from penstock import rpc
from penstock.trajectory import Task
from penstock.v1 import environment_pb2 as pb
from penstock.v1 import trajectory_pb2
from penstock.v1.environment_pb2_grpc import (
    EnvironmentServiceServicer,
    add_EnvironmentServiceServicer_to_server,
)

ROLLOUTS = 128
TASK = Task("words", "train", 0, 0)
FIRST = wire.reset_to_wire((Message(role="user", content="brook="),))
REWARD = trajectory_pb2.Reward(status=trajectory_pb2.REWARD_STATUS_VALID, value=1.0)


class Single(EnvironmentServiceServicer):
    """Takes single calls."""

    async def Reset(self, request: pb.ResetRequest, context: Any) -> pb.ResetResponse:
        return FIRST

    async def Step(self, request: pb.StepRequest, context: Any) -> pb.StepResponse:
        return pb.StepResponse(done=True, reward=REWARD)

    async def Close(self, request: pb.CloseRequest, context: Any) -> pb.CloseResponse:
        return pb.CloseResponse()


class Streaming(Single):
    """And a stream of them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def Play(
        self, request_iterator: AsyncIterator[pb.PlayRequest], context: Any
    ) -> AsyncIterator[pb.PlayResponse]:
        handlers: Handlers = {"reset": self.Reset, "step": self.Step, "close": self.Close}
        async for response in Calls(handlers, self._spawn).answers(request_iterator):
            yield response


async def rollout(client: EnvironmentClient, name: str) -> None:
    async with client.session(session_id=name, fence=1, task=TASK) as episode:
        await episode.step("koorb")


async def rollouts_us(client: EnvironmentClient, number: int) -> float:
    """Processor time of one, when ROLLOUTS are played at once."""
    began = time.process_time()
    async with asyncio.TaskGroup() as group:
        for place in range(ROLLOUTS):
            group.create_task(rollout(client, f"{number}.{place}"))
    return 1e6 * (time.process_time() - began) / ROLLOUTS


async def measure(service: Single, *, rounds: int) -> float:
    server = rpc.server()
    add_EnvironmentServiceServicer_to_server(service, server)
    port = rpc.bind(server, "127.0.0.1:0")
    async with rpc.serving(server, grace_seconds=0), EnvironmentClient(f"127.0.0.1:{port}") as client:
        times = [await rollouts_us(client, number) for number in range(1 + rounds)]
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    add_arguments(parser)
    arguments = parser.parse_args()
    single = asyncio.run(measure(Single(), rounds=arguments.rounds))
    stream = asyncio.run(measure(Streaming(), rounds=arguments.rounds))
    write({"single_over_stream": single / stream, "stream_us": stream, "single_us": single}, arguments)


if __name__ == "__main__":
    main()
