"""How commands and the live view talk to a learner: protos/penstock/v1/operator.proto.

    async with RunClient("127.0.0.1:7070") as run:
        print((await run.status()).version)

Every call has a deadline. A learner that does not answer is a PeerLost, with what to do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import grpc

from penstock import rpc
from penstock.errors import PeerLost, PenstockError, ProtocolError
from penstock.v1 import operator_pb2 as pb
from penstock.v1.operator_pb2_grpc import OperatorServiceStub

RequestT = TypeVar("RequestT", contravariant=True)
ResponseT_co = TypeVar("ResponseT_co", covariant=True)


class _Method(Protocol[RequestT, ResponseT_co]):
    def __call__(self, request: RequestT, /, *, timeout: float) -> Any: ...


class RunClient:
    """The operator's side of one learner, in one event loop."""

    def __init__(self, address: str, *, timeout_seconds: float = 5.0) -> None:
        """Raises ConfigError if the address is not HOST:PORT."""
        self.address = address
        self._timeout_seconds = timeout_seconds
        self._channel = rpc.channel(address)
        self._stub: Any = OperatorServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def status(self) -> pb.GetStatusResponse:
        response: pb.GetStatusResponse = await self._call(self._stub.GetStatus, pb.GetStatusRequest())
        return response

    async def why(self) -> list[str]:
        response: pb.WhyResponse = await self._call(self._stub.Why, pb.WhyRequest())
        return list(response.lines)

    async def pause(self) -> None:
        await self._call(self._stub.Pause, pb.PauseRequest())

    async def resume(self) -> None:
        await self._call(self._stub.Resume, pb.ResumeRequest())

    async def checkpoint(self) -> None:
        await self._call(self._stub.Checkpoint, pb.CheckpointRequest())

    async def events(self, *, after: int, follow: bool) -> AsyncIterator[pb.WatchEventsResponse]:
        """Past events, then, if `follow`, new ones until the run ends. Following has no deadline."""
        request = pb.WatchEventsRequest(after=after, follow=follow)
        try:
            async for event in self._stub.WatchEvents(
                request, timeout=None if follow else self._timeout_seconds
            ):
                yield event
        except grpc.aio.AioRpcError as error:
            raise self._explained(error) from None

    async def _call(self, method: _Method[RequestT, ResponseT_co], request: RequestT) -> Any:
        try:
            return await method(request, timeout=self._timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise self._explained(error) from None

    def _explained(self, error: grpc.aio.AioRpcError) -> PenstockError:
        return explain(error, _LEARNER, self.address, self._timeout_seconds)


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom a call was meant for."""

    kind: str
    advice: str
    """What to do when it does not answer."""


_LEARNER = Peer(
    "learner", "start it with `penstock learner RUN.toml`, or name another with --learner HOST:PORT"
)


def explain(error: grpc.aio.AioRpcError, peer: Peer, address: str, timeout_seconds: float) -> PenstockError:
    """The error of a call as one of ours: who did not answer, and what to do."""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return PeerLost(f"no {peer.kind} answers at {address}; {peer.advice}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return PeerLost(
                f"the {peer.kind} at {address} did not answer within {timeout_seconds:g} s; try again"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolError(f"{address} answers, but is no {peer.kind}; {peer.advice}")
        case code:
            return PenstockError(f"the {peer.kind} at {address} refused: {code.name}: {error.details()}")
