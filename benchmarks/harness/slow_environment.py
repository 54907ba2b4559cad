"""An environment server in front of another, whose steps take as long as real ones do.

    python benchmarks/harness/slow_environment.py UPSTREAM --least 0.05 --most 2.0 --seed 0

Each step is answered after a delay from a Pareto distribution between `least` and `most`
seconds, drawn by session, so that two runs with the same seed wait alike.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from typing import Any

import uvloop

from penstock import rpc
from penstock.signals import Stop
from penstock.v1 import environment_pb2 as pb
from penstock.v1 import environment_pb2_grpc

_CALL_SECONDS = 30.0
_SHAPE = 1.0
"""Of the Pareto distribution: the smaller, the heavier the tail."""


class SlowEnvironment(environment_pb2_grpc.EnvironmentServiceServicer):
    """Passes every call on; sleeps before a step's answer."""

    def __init__(self, upstream: str, *, least: float, most: float, seed: int) -> None:
        self._stub = environment_pb2_grpc.EnvironmentServiceStub(rpc.channel(upstream))
        self._least, self._most, self._seed = least, most, seed

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> Any:  # noqa: N802
        return await self._stub.Describe(request, timeout=_CALL_SECONDS)

    async def Reset(self, request: pb.ResetRequest, context: Any) -> Any:  # noqa: N802
        return await self._stub.Reset(request, timeout=_CALL_SECONDS)

    async def Step(self, request: pb.StepRequest, context: Any) -> Any:  # noqa: N802
        await asyncio.sleep(self.delay(request.session_id))
        return await self._stub.Step(request, timeout=_CALL_SECONDS)

    async def Renew(self, request: pb.RenewRequest, context: Any) -> Any:  # noqa: N802
        return await self._stub.Renew(request, timeout=_CALL_SECONDS)

    async def Close(self, request: pb.CloseRequest, context: Any) -> Any:  # noqa: N802
        return await self._stub.Close(request, timeout=_CALL_SECONDS)

    def delay(self, session_id: str) -> float:
        """Seconds. A session's id is RUN.GROUP.SLOT; the run's name is drawn anew for each run."""
        chance = random.Random(f"{self._seed}.{session_id.partition('.')[2]}")
        return min(self._least * chance.paretovariate(_SHAPE), self._most)


async def _serve(arguments: argparse.Namespace) -> None:
    stop = Stop()
    stop.on_signals()
    server = rpc.server()
    slow = SlowEnvironment(
        arguments.upstream, least=arguments.least, most=arguments.most, seed=arguments.seed
    )
    environment_pb2_grpc.add_EnvironmentServiceServicer_to_server(slow, server)
    rpc.add_standard_services(server, ())
    port = rpc.bind(server, "127.0.0.1:0")
    async with rpc.serving(server, grace_seconds=0.5):
        print(f"serving on 127.0.0.1:{port}", flush=True)
        await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upstream")
    parser.add_argument("--least", type=float, default=0.05)
    parser.add_argument("--most", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    uvloop.run(_serve(parser.parse_args()))
