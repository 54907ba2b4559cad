"""The server's side of a stream of calls: each runs by itself, and is answered when it is through."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, NoReturn

import grpc

from environments.calls import FAULT_KEY, gather_seconds, take
from penstock.rpc import to_seconds
from penstock.v1 import environment_pb2 as pb

_log = logging.getLogger(__name__)

_AT_ONCE = frozenset({"renew", "close"})
"""Calls that wait for nothing."""
MAX_CALLS = 4096
"""Of one stream at a time; more are not read."""


class Aborted(Exception):
    """A handler's way out with a status."""

    def __init__(self, failure: pb.Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class CallContext:
    """What a handler asks of gRPC's context, for one call in a stream."""

    def __init__(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = (), /
    ) -> NoReturn:
        fault = dict(trailing_metadata).get(FAULT_KEY, "")
        raise Aborted(pb.Failure(code=code.value[0], message=details, fault=fault))


Handlers = dict[str, Callable[[Any, Any], Awaitable[Any]]]
Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


class Calls:
    """One stream's calls under way, and the answers that wait to be sent."""

    def __init__(self, handlers: Handlers, spawn: Spawn) -> None:
        self._handlers = handlers
        self._spawn = spawn
        self._room = asyncio.Semaphore(MAX_CALLS)
        self._num_running = 0
        self._answers: deque[pb.Answer] = deque()
        self._changed = asyncio.Event()
        self._ended = False

    def end(self) -> None:
        """Takes no more calls; those under way are still answered."""
        self._ended = True
        self._changed.set()

    async def answers(self, requests: AsyncIterator[pb.PlayRequest]) -> AsyncIterator[pb.PlayResponse]:
        """Until there are no more calls, and all are answered."""
        reading = self._spawn(self._read(requests), "reader of calls")
        try:
            while self._answers or self._num_running or not self._ended:
                await self._changed.wait()
                if self._num_running:
                    await asyncio.sleep(gather_seconds(self._num_running))
                self._changed.clear()
                while self._answers:
                    yield pb.PlayResponse(answers=take(self._answers))
        finally:
            reading.cancel()

    async def _read(self, requests: AsyncIterator[pb.PlayRequest]) -> None:
        try:
            async for request in requests:
                for call in request.calls:
                    await self._room.acquire()
                    if self._ended:
                        return
                    self._num_running += 1
                    if call.WhichOneof("request") in _AT_ONCE:
                        await self._run(call)
                    else:
                        self._spawn(self._run(call), f"call {call.call_id}")
        except Exception as error:  # noqa: BLE001  the boundary of a stream: whatever its client sent ends it alone
            _log.warning("a stream of calls ends: %s: %s", type(error).__name__, error)
        finally:
            self.end()

    async def _run(self, call: pb.Call) -> None:
        try:
            self._answers.append(await self._answer(call))
        finally:
            self._num_running -= 1
            self._room.release()
            self._changed.set()

    async def _answer(self, call: pb.Call) -> pb.Answer:
        name = call.WhichOneof("request") or ""
        handler = self._handlers.get(name)
        if handler is None:
            return _failed(call, grpc.StatusCode.INVALID_ARGUMENT, "the call asks for nothing known here")
        seconds = to_seconds(call.timeout) if call.HasField("timeout") else None
        try:
            response = await handler(getattr(call, name), CallContext(seconds))
        except Aborted as aborted:
            return pb.Answer(call_id=call.call_id, failure=aborted.failure)
        except Exception as error:  # noqa: BLE001  the boundary of a call, as gRPC has it of an RPC
            _log.exception("%s failed", name)
            return _failed(call, grpc.StatusCode.UNKNOWN, f"{name} failed: {error}")
        return pb.Answer(call_id=call.call_id, **{name: response})


def _failed(call: pb.Call, code: grpc.StatusCode, message: str) -> pb.Answer:
    return pb.Answer(call_id=call.call_id, failure=pb.Failure(code=code.value[0], message=message))
