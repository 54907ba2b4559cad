"""How an actor plays an environment: describe, and episodes.

    async with EnvironmentClient("127.0.0.1:7081") as client:
        async with client.session(session_id=lease_id, fence=attempt, task=task) as episode:
            result = await episode.step(policy_writes(episode.messages))

Every call has a deadline. Whatever goes wrong, from a refused connection to a reply that
is not whole, is an EnvironmentFault with its kind before anything else sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from environments import wire
from environments.base import Description, Message, StepResult
from environments.calls import CallFailed, StreamedCalls, call_alone
from penstock import rpc
from penstock.codec import task_to_wire
from penstock.errors import EnvironmentFault, EnvironmentFull, FaultKind, ProtocolError
from penstock.trajectory import RewardStatus, Task
from penstock.v1 import environment_pb2 as pb
from penstock.v1.environment_pb2_grpc import EnvironmentServiceStub

_log = logging.getLogger(__name__)

_CLOSE_SECONDS = 2.0
_MAX_RETRIES = 3
_TOO_LARGE = "larger than max"
"""gRPC's own words for a message beyond its limit, under the code of a server without room."""
_LEAST_TTL_SECONDS = 1.0
"""However short a session's time-to-live, it is not renewed more than six times a second."""
_FIRST_PAUSE_SECONDS = 0.1
_MAX_PAUSE_SECONDS = 2.0

ResponseT = TypeVar("ResponseT")


class EnvironmentClient:
    """One environment server, from one event loop. Sessions may be many at once."""

    def __init__(
        self, address: str, *, reset_timeout_seconds: float = 30.0, step_timeout_seconds: float = 60.0
    ) -> None:
        self.address = address
        self.reset_timeout_seconds = reset_timeout_seconds
        self.step_timeout_seconds = step_timeout_seconds
        self._channel = rpc.channel(address)
        self._stub = EnvironmentServiceStub(self._channel)
        self._streamed: StreamedCalls | None = StreamedCalls(self._stub.Play)
        """None once the server has said that it takes single calls only."""
        self._closing: set[asyncio.Task[None]] = set()
        """Of sessions, by single calls: nobody waits for them but `close`."""
        self._episodes: set[Episode] = set()
        """Open ones."""
        self._session_ttl_seconds: float | None = None
        """None until the environment was described."""
        self._renewing: asyncio.Task[None] | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self._is_closed = True
        if self._renewing is not None:
            self._renewing.cancel()
        if self._closing:
            await asyncio.wait(self._closing, timeout=_CLOSE_SECONDS)
        if self._streamed is not None:
            await self._streamed.close(_CLOSE_SECONDS)
        await self._channel.close()

    async def describe(self) -> Description:
        """Raises EnvironmentFault."""
        response = await self._call("describe", pb.DescribeRequest(), self.reset_timeout_seconds)
        description = self._read(wire.description_from_wire, response)
        self._session_ttl_seconds = max(description.session_ttl_seconds, _LEAST_TTL_SECONDS)
        return description

    @contextlib.asynccontextmanager
    async def session(self, *, session_id: str, fence: int, task: Task) -> AsyncIterator[Episode]:
        """Opens a session on a task, and closes it in any case, without waiting. Raises EnvironmentFault.

        While the server is full, waits for up to the deadline of a reset; then raises EnvironmentFull. Once the
        environment was described, the session's lease is renewed while no step is asked for; one that is lost
        all the same fails its next step.
        """
        episode: Episode | None = None
        try:
            request = pb.ResetRequest(session_id=session_id, fence=fence, task=task_to_wire(task))
            response = await self._call("reset", request, self.reset_timeout_seconds)
            messages, digest = self._read(wire.reset_from_wire, response)
            episode = Episode(
                self, session_id=session_id, fence=fence, messages=messages, observation_digest=digest
            )
            self._episodes.add(episode)
            if self._renewing is None and self._session_ttl_seconds is not None:
                renew = self._renew(self._session_ttl_seconds / 6)
                self._renewing = asyncio.create_task(renew, name=f"renew sessions at {self.address}")
            yield episode
        finally:
            if episode is not None:
                self._episodes.discard(episode)
            self._close_session(pb.CloseRequest(session_id=session_id, fence=fence))

    def _close_session(self, request: pb.CloseRequest) -> None:
        """A session that cannot be closed expires."""
        if self._is_closed:
            return
        if self._streamed is not None:
            self._streamed.post("close", request, _CLOSE_SECONDS)
            return
        closing = asyncio.create_task(self._close_alone(request), name=f"close {request.session_id}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _close_alone(self, request: pb.CloseRequest) -> None:
        try:
            await call_alone(self._stub, "close", request, _CLOSE_SECONDS)
        except CallFailed as failed:
            _log.debug("session %s at %s was not closed: %s", request.session_id, self.address, failed)

    async def step(self, request: pb.StepRequest) -> StepResult:
        """One step of an Episode."""
        response = await self._call("step", request, self.step_timeout_seconds)
        result = self._read(wire.result_from_wire, response)
        self._refuse_failed(result)
        return result

    async def _renew(self, seconds: float) -> None:
        """Looks as often for sessions that were not called for twice as long, and renews them."""
        while True:
            await asyncio.sleep(seconds)
            now = time.monotonic()
            quiet = [each for each in self._episodes if now - each.called_at > 2 * seconds]
            await asyncio.gather(*(self._renew_one(episode) for episode in quiet))

    async def _renew_one(self, episode: Episode) -> None:
        try:
            await episode.renew()
        except EnvironmentFault as fault:
            _log.info("a session was not renewed: %s", fault)

    async def renew(self, request: pb.RenewRequest) -> None:
        """Renews the lease of an Episode."""
        await self._call("renew", request, self.reset_timeout_seconds)

    async def _call(self, name: str, request: object, seconds: float) -> Any:
        """Calls by a deadline; every call may be repeated, so a server that is away or full is asked again."""
        deadline = time.monotonic() + seconds
        num_retries, pause = 0, _FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self._once(name, request, max(deadline - time.monotonic(), 0.001))
            except CallFailed as failed:
                away = failed.code is grpc.StatusCode.UNAVAILABLE and num_retries < _MAX_RETRIES
                full = failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                if not (away or full) or time.monotonic() + pause >= deadline:
                    if full and name == "reset" and _TOO_LARGE not in failed.details:
                        raise EnvironmentFull(
                            f"the environment at {self.address} is full: {failed.details}"
                        ) from None
                    raise self._fault(failed) from None
                num_retries += away
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    async def _once(self, name: str, request: object, seconds: float) -> Any:
        """Over the stream, if the server has one. Raises CallFailed."""
        if self._streamed is not None and name != "describe":
            try:
                return await self._streamed(name, request, seconds)
            except CallFailed as failed:
                if failed.code is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
            if self._streamed is not None:
                _log.info("the environment at %s takes single calls only", self.address)
                self._streamed = None
        return await call_alone(self._stub, name, request, seconds)

    def _read(self, read: Callable[[Any], ResponseT], response: object) -> ResponseT:
        try:
            return read(response)
        except ProtocolError as error:
            raise EnvironmentFault(
                f"the environment at {self.address} answered with garbage: {error}"
            ) from error

    def _refuse_failed(self, result: StepResult) -> None:
        """A reward that says that something failed is a fault, and no reward."""
        kind = _FAILED.get(result.reward.status)
        if kind is not None:
            raise EnvironmentFault(
                f"the environment at {self.address} could not score: {result.reward.status}: {result.reward.message}",
                kind=kind,
            )

    def _fault(self, failed: CallFailed) -> EnvironmentFault:
        is_data = (
            failed.fault == FaultKind.DATA if failed.fault else failed.code is grpc.StatusCode.OUT_OF_RANGE
        )
        return EnvironmentFault(
            f"the environment at {self.address} failed with {failed.code.name}: {failed.details}",
            kind=FaultKind.DATA if is_data else FaultKind.INFRASTRUCTURE,
        )


_FAILED = {
    RewardStatus.INFRASTRUCTURE_ERROR: FaultKind.INFRASTRUCTURE,
    # It depends on the answer, and so on the task, far more than on the machine.
    RewardStatus.SCORER_TIMEOUT: FaultKind.DATA,
}


class Episode:
    """An open session. Steps come one after the other."""

    def __init__(
        self,
        client: EnvironmentClient,
        *,
        session_id: str,
        fence: int,
        messages: tuple[Message, ...],
        observation_digest: str,
    ) -> None:
        self.messages = messages
        """What the policy reads first."""
        self.observation_digest = observation_digest
        self.num_steps = 0
        self.called_at = time.monotonic()
        """When a call of it began or ended last, in monotonic seconds."""
        self._client = client
        self._session_id = session_id
        self._fence = fence

    async def step(self, action: str) -> StepResult:
        """Hands over what the policy wrote. Raises EnvironmentFault, after which the episode is lost."""
        request = pb.StepRequest(
            session_id=self._session_id, fence=self._fence, step_index=self.num_steps, action=action
        )
        result = await self._client.step(request)
        self.num_steps += 1
        self.called_at = time.monotonic()
        return result

    async def renew(self) -> None:
        """Keeps the session open while the policy is slow. Raises EnvironmentFault."""
        self.called_at = time.monotonic()
        await self._client.renew(pb.RenewRequest(session_id=self._session_id, fence=self._fence))
