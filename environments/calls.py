"""How a driver's calls reach a server: one RPC each, or many at a time over one stream.

    reset, step, close of many sessions --> queue --> writer ==stream==> server
    each one's future            <--  reader  <==stream==  as answers are found

A stream is opened by the first call, and again by the next one after it broke. What waits
on a stream that breaks fails with its status; every call may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from penstock.errors import PenstockError
from penstock.rpc import to_duration
from penstock.v1 import environment_pb2 as pb

FAULT_KEY = "penstock-fault"
CODES = {code.value[0]: code for code in grpc.StatusCode}
MAX_BYTES = 4 * 1024 * 1024
"""Of one message, unless a single call has more."""

_FEW_CALLS = 16
_GATHER_SECONDS = 0.016
_EXPIRY_SECONDS = 0.05
"""Between two looks at what waits for too long."""

_Stream = grpc.aio.StreamStreamCall[pb.PlayRequest, pb.PlayResponse]


class CallFailed(PenstockError):
    """A call's status, when it is not OK."""

    def __init__(self, code: grpc.StatusCode, details: str, fault: str = "") -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.fault = fault
        """The kind that the server told, if it did."""

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> CallFailed:
        told = dict(error.trailing_metadata() or ()).get(FAULT_KEY, "")
        return cls(error.code(), error.details() or "", str(told))


async def call_alone(stub: Any, name: str, request: Any, seconds: float) -> Any:
    """One RPC of an EnvironmentServiceStub. Raises CallFailed."""
    try:
        return await getattr(stub, name.capitalize())(request, timeout=seconds)
    except grpc.aio.AioRpcError as error:
        raise CallFailed.of(error) from None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A call that waits for its answer."""

    name: str
    seconds: float
    deadline: float
    """Of the event loop's clock."""
    answer: asyncio.Future[pb.Answer]

    def fail(self, reason: CallFailed) -> None:
        if not self.answer.done():
            self.answer.set_exception(reason)


class StreamedCalls:
    """All calls of one event loop to one server."""

    def __init__(self, open_stream: Callable[[], _Stream]) -> None:
        self._open_stream = open_stream
        self._conversation: _Conversation | None = None

    async def __call__(self, name: str, request: Any, seconds: float) -> Any:
        """Raises CallFailed."""
        answer = await self._current().ask(name, request, seconds)
        if answer.HasField("failure"):
            failure = answer.failure
            code = CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
            raise CallFailed(code, failure.message, failure.fault)
        if answer.WhichOneof("response") != name:
            raise CallFailed(grpc.StatusCode.INTERNAL, f"the answer to {name} is none")
        return getattr(answer, name)

    def post(self, name: str, request: Any, seconds: float) -> None:
        """Makes a call whose answer nobody reads."""
        self._current().post(name, request, seconds)

    async def close(self, seconds: float) -> None:
        """Ends the stream once what was posted is answered, or after so long."""
        if self._conversation is not None:
            await self._conversation.close(seconds)

    def _current(self) -> _Conversation:
        if self._conversation is None or self._conversation.is_over:
            self._conversation = _Conversation(self._open_stream)
        return self._conversation


class _Conversation:
    """One stream, from its opening to its end."""

    def __init__(self, open_stream: Callable[[], _Stream]) -> None:
        self._stream = open_stream()
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Asked] = {}
        self._unsent: deque[pb.Call] = deque()
        self._queued = asyncio.Event()
        self._posted: set[asyncio.Future[pb.Answer]] = set()
        self._running = asyncio.create_task(self._run(), name="stream of environment calls")

    @property
    def is_over(self) -> bool:
        return self._running.done()

    async def ask(self, name: str, request: Any, seconds: float) -> pb.Answer:
        """Waits for the answer. Raises CallFailed if it is not here in time, or the stream ends before."""
        call_id, answer = self._queue(name, request, seconds)
        try:
            return await answer
        finally:
            del self._waiting[call_id]

    def post(self, name: str, request: Any, seconds: float) -> None:
        """Makes a call whose answer, or failure, nobody reads."""
        call_id, answer = self._queue(name, request, seconds)
        self._posted.add(answer)

        def forget(_: asyncio.Future[pb.Answer]) -> None:
            answer.exception()  # asyncio would log it as forgotten
            self._posted.discard(answer)
            del self._waiting[call_id]

        answer.add_done_callback(forget)

    def _queue(self, name: str, request: Any, seconds: float) -> tuple[int, asyncio.Future[pb.Answer]]:
        loop = asyncio.get_running_loop()
        call_id, answer = next(self._ids), loop.create_future()
        self._waiting[call_id] = _Asked(name, seconds, loop.time() + seconds, answer)
        self._unsent.append(pb.Call(call_id=call_id, timeout=to_duration(seconds), **{name: request}))
        self._queued.set()
        return call_id, answer

    async def close(self, seconds: float) -> None:
        """Waits for what was posted, at most so long."""
        if self._posted:
            await asyncio.wait(self._posted, timeout=seconds)
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    async def _run(self) -> None:
        """Reads to the end; then whoever still waits hears why."""
        reason = CallFailed(grpc.StatusCode.UNAVAILABLE, "the server ended the stream")
        others = (
            asyncio.create_task(self._write(), name="writer of environment calls"),
            asyncio.create_task(self._expire(), name="deadlines of environment calls"),
        )
        try:
            await self._read()
        except grpc.aio.AioRpcError as error:
            reason = CallFailed.of(error)
            if reason.code is grpc.StatusCode.INTERNAL:
                # The server ended the stream as it was written to; why, gRPC does not tell then.
                reason = CallFailed(grpc.StatusCode.UNAVAILABLE, f"the stream broke: {reason.details}")
        finally:
            for task in others:
                task.cancel()
            self._stream.cancel()
            for asked in self._waiting.values():
                asked.fail(reason)

    async def _read(self) -> None:
        while isinstance(response := await self._stream.read(), pb.PlayResponse):
            for answer in response.answers:
                asked = self._waiting.get(answer.call_id)
                if asked is not None and not asked.answer.done():
                    asked.answer.set_result(answer)

    async def _expire(self) -> None:
        """Ends what waits for too long. One timer for all: with uvloop, one a call costs as much as the call."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_EXPIRY_SECONDS)
            for asked in self._waiting.values():
                if asked.deadline <= loop.time():
                    late = f"no answer to {asked.name} within {asked.seconds:.3g} s"
                    asked.fail(CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, late))

    async def _write(self) -> None:
        """Sends what is queued. Why a stream has ended is for the reader to find."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._queued.wait()
                await asyncio.sleep(gather_seconds(len(self._waiting)))
                self._queued.clear()
                while self._unsent:
                    await self._stream.write(pb.PlayRequest(calls=take(self._unsent)))


def gather_seconds(num_calls: int) -> float:
    """How long a message waits for more, by the calls that are under way: a message costs more than a call in it.

    With few of them, whoever is ready to run in this turn of the loop comes along.
    """
    return 0.0 if num_calls <= _FEW_CALLS else _GATHER_SECONDS


def take(queue: deque[Any]) -> list[Any]:
    """The first messages of a queue, at least one and as many as fit."""
    taken = [queue.popleft()]
    num_bytes = taken[0].ByteSize()
    while queue and (num_bytes := num_bytes + queue[0].ByteSize()) <= MAX_BYTES:
        taken.append(queue.popleft())
    return taken
