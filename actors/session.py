"""The actor's side of a session: join, stay joined, and say why when that ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from penstock import rpc
from penstock.codec import version_to_wire
from penstock.errors import ConfigError, PeerLost, PenstockError, ProtocolError, SessionFenced, Stopped
from penstock.signals import Stop
from penstock.trajectory import PolicyVersion
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import coordinator_pb2_grpc, weights_pb2, weights_pb2_grpc
from penstock.weights.manifest import WeightsMedium

_log = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

CALL_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_UNREACHABLE = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
)


class LearnerUnreachable(ConfigError):
    """Nobody answers at the learner's address."""


class SessionLost(PeerLost):
    """The learner does not know the session; a new one is to be joined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What this process says of itself."""

    actor_id: str
    engine: str
    num_slots: int
    address: str
    hostname: str
    pid: int
    device: str
    weights_medium: WeightsMedium = WeightsMedium.PULL


class Session:
    """A session that is joined again whenever the learner does not know it any more.

    `call` retries while the learner is away, for at most `patience_seconds` in a row.
    """

    def __init__(
        self,
        address: str,
        identity: Identity,
        stop: Stop,
        *,
        protocol: int,
        patience_seconds: float,
        held_leases: Callable[[], Sequence[str]],
        installed: Callable[[], PolicyVersion | None] = lambda: None,
    ) -> None:
        self.address = address
        self.channel = rpc.channel(address)
        self.stub = coordinator_pb2_grpc.CoordinatorServiceStub(self.channel)
        self.session_id = ""
        self._identity = identity
        self._stop = stop
        self._protocol = protocol
        self.patience_seconds = patience_seconds
        self._held_leases = held_leases
        self._installed = installed
        self._joining = asyncio.Lock()

    async def join(self, *, connect_seconds: float) -> pb.JoinResponse:
        """Joins for the first time. Raises LearnerUnreachable, ProtocolError."""
        return await self._join(connect_seconds)

    async def call(self, request: Callable[[str], Awaitable[AnswerT]]) -> AnswerT:
        """Makes a unary call with the session's id; joins again and retries as needed.

        Raises SessionFenced, LearnerUnreachable (after the patience), ProtocolError.
        """
        given_up_at = time.monotonic() + self.patience_seconds
        while True:
            session_id = self.session_id
            try:
                return await request(session_id)
            except grpc.aio.AioRpcError as error:
                await self.recover(translate(error), session_id, given_up_at)

    async def recover(self, problem: PenstockError, session_id: str, given_up_at: float) -> None:
        """Returns when what failed with `problem` may be tried again; else raises it, or LearnerUnreachable."""
        if isinstance(problem, SessionLost):
            await self._join_again(session_id, max(given_up_at - time.monotonic(), CALL_SECONDS))
            return
        if not isinstance(problem, PeerLost):
            raise problem
        if time.monotonic() >= given_up_at:
            raise LearnerUnreachable(
                f"the learner at {self.address} did not answer for {self.patience_seconds:.0f} s: {problem}"
            )
        await asyncio.sleep(_RETRY_SECONDS)

    async def policy_files(self) -> dict[str, bytes]:
        """Fetches the policy's configuration and tokeniser."""
        stub = weights_pb2_grpc.WeightsServiceStub(self.channel)

        async def fetch(session_id: str) -> dict[str, bytes]:
            files: dict[str, bytearray] = {}
            name = ""
            request = weights_pb2.FetchPolicyFilesRequest(session_id=session_id)
            async for piece in stub.FetchPolicyFiles(request, timeout=60.0):
                name = piece.name or name
                files.setdefault(name, bytearray()).extend(piece.data)
            return {name: bytes(data) for name, data in files.items()}

        return await self.call(fetch)

    async def leave(self, reason: str) -> None:
        """Ends the session; if the learner is away, it will notice by itself."""
        try:
            await self.stub.Leave(pb.LeaveRequest(session_id=self.session_id, reason=reason), timeout=2.0)
        except grpc.aio.AioRpcError as error:
            _log.info("could not say goodbye: %s", error.details())

    async def close(self) -> None:
        await self.channel.close()

    async def _join_again(self, lost: str, patience: float) -> None:
        async with self._joining:
            if self.session_id == lost:
                _log.warning("session %s is lost; joining again", lost)
                await self._join(patience)

    async def _join(self, patience: float) -> pb.JoinResponse:
        deadline = time.monotonic() + patience
        while True:
            try:
                answer: pb.JoinResponse = await self.stub.Join(self._join_request(), timeout=CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                problem = translate(error)
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    problem = PeerLost(error.details() or "the learner takes no more actors now")
                if not isinstance(problem, PeerLost):
                    raise problem from error
                await self._wait_for_learner(deadline, patience, problem)
            else:
                self.session_id = answer.session_id
                return answer

    async def _wait_for_learner(self, deadline: float, patience: float, problem: PenstockError) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise LearnerUnreachable(
                f"no learner answers at {self.address} after {patience:.0f} s of trying ({problem}); start one with "
                "`penstock learner RUN.toml`, or correct --learner"
            )
        _log.info("waiting for the learner at %s, %.0f s more: %s", self.address, left, problem)
        if await self._stop.sleep(min(2.0, max(left, 0.1))):
            raise Stopped(f"stopped while waiting for the learner at {self.address}")

    def _join_request(self) -> pb.JoinRequest:
        identity, installed = self._identity, self._installed()
        return pb.JoinRequest(
            actor_id=identity.actor_id,
            protocol=self._protocol,
            engine=identity.engine,
            num_slots=identity.num_slots,
            address=identity.address,
            hostname=identity.hostname,
            pid=identity.pid,
            device=identity.device,
            weights_medium=identity.weights_medium,
            lease_ids=self._held_leases(),
            installed=None if installed is None else version_to_wire(installed),
        )


def translate(error: grpc.aio.AioRpcError) -> PenstockError:
    """Our error for a gRPC one: PeerLost where trying again may help."""
    details = error.details() or error.code().name
    if error.code() is grpc.StatusCode.ABORTED:
        return SessionFenced(details)
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return SessionLost(details)
    if error.code() in _UNREACHABLE or error.code() is grpc.StatusCode.DATA_LOSS:
        return PeerLost(details)
    if error.code() is grpc.StatusCode.INTERNAL:
        return PeerLost(f"the learner failed: {details}")
    return ProtocolError(f"the learner refused a call: {error.code().name}: {details}")
