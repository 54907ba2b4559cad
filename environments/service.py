"""EnvironmentService over a host: the rules of environment.proto, and deadlines.

    RPC --> SessionTable (may it?) --> a task of its own (runs the call to its deadline)
     \\______ waits for that task's outcome; a repeated RPC waits for the same one _____/

So a driver that gave up does not stop a call in the middle, and finds its answer if it
asks again.
"""

# ruff: noqa: N802  the methods' names are the contract's

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, NoReturn

import grpc

from environments import wire
from environments.base import Message, StepResult
from environments.calls import FAULT_KEY
from environments.hosts import Episode, Host
from environments.pool import PoolBusy
from environments.sessions import Call, Refusal, Session, SessionRefused, SessionTable
from environments.streams import Calls
from environments.worker_process import WorkerTimeout
from penstock.codec import task_from_wire
from penstock.errors import EnvironmentFault, FaultKind, ProtocolError
from penstock.trajectory import Task
from penstock.v1 import environment_pb2 as pb
from penstock.v1.environment_pb2_grpc import EnvironmentServiceServicer

_log = logging.getLogger(__name__)

MAX_ACTION_BYTES = 4 * 1024 * 1024
_MAX_ID_CHARACTERS = 256

Response = pb.ResetResponse | pb.StepResponse
Outcome = asyncio.Task[Response | EnvironmentFault]
_Session = Session[Episode, Outcome]
_Context = grpc.aio.ServicerContext[Any, Any]

_CODES = {
    Refusal.FENCED: grpc.StatusCode.ABORTED,
    Refusal.LOST: grpc.StatusCode.FAILED_PRECONDITION,
    Refusal.CONFLICT: grpc.StatusCode.INVALID_ARGUMENT,
    Refusal.FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class EnvironmentService(EnvironmentServiceServicer):
    """One environment, many sessions."""

    def __init__(
        self,
        host: Host,
        *,
        group: asyncio.TaskGroup,
        call_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._group = group
        self._call_seconds = call_seconds
        self._description = host.description
        self._sessions: SessionTable[Episode, Outcome] = SessionTable(
            ttl_seconds=self._description.session_ttl_seconds,
            max_sessions=self._description.max_sessions,
            clock=clock,
        )
        self._running: set[asyncio.Task[Any]] = set()
        self._streams: set[Calls] = set()

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.DescribeResponse:
        return wire.description_to_wire(self._description)

    async def Reset(self, request: pb.ResetRequest, context: _Context) -> pb.ResetResponse:
        task = task_from_wire(request.task)
        await self._check_session_id(request.session_id, context)
        await self._check_task(task, context)
        seconds = await self._seconds(context)
        try:
            session, replaced = self._sessions.begin_reset(request.session_id, request.fence, task)
        except SessionRefused as refused:
            await _refuse(context, refused)
        if replaced is not None:
            self._release(replaced)
        if session.reset.outcome is None:
            session.owner = episode = self._host.episode(task)
            session.reset.outcome = self._begin(
                session, session.reset, lambda: episode.reset(seconds), _first_observation
            )
        response = await self._outcome(session.reset, context)
        assert isinstance(response, pb.ResetResponse)
        return response

    async def Step(self, request: pb.StepRequest, context: _Context) -> pb.StepResponse:
        num_bytes = len(request.action.encode())
        if num_bytes > MAX_ACTION_BYTES:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"an action of {num_bytes} bytes; expected at most {MAX_ACTION_BYTES}",
            )
        seconds = await self._seconds(context)
        try:
            session, call = self._sessions.begin_step(
                request.session_id, request.fence, request.step_index, request.action
            )
        except SessionRefused as refused:
            await _refuse(context, refused)
        if call.outcome is None:
            episode, action = session.owner, request.action
            assert episode is not None
            call.outcome = self._begin(session, call, lambda: episode.step(action, seconds), _step_result)
        response = await self._outcome(call, context)
        assert isinstance(response, pb.StepResponse)
        return response

    async def Renew(self, request: pb.RenewRequest, context: _Context) -> pb.RenewResponse:
        try:
            self._sessions.renew(request.session_id, request.fence)
        except SessionRefused as refused:
            await _refuse(context, refused)
        return pb.RenewResponse()

    async def Close(self, request: pb.CloseRequest, context: _Context) -> pb.CloseResponse:
        try:
            session = self._sessions.close(request.session_id, request.fence)
        except SessionRefused as refused:
            await _refuse(context, refused)
        if session is not None:
            self._release(session)
        return pb.CloseResponse()

    async def Play(
        self, request_iterator: AsyncIterator[pb.PlayRequest], context: object
    ) -> AsyncIterator[pb.PlayResponse]:
        calls = Calls(
            {"reset": self.Reset, "step": self.Step, "renew": self.Renew, "close": self.Close},
            lambda work, name: self._spawn(work, name=name),
        )
        self._streams.add(calls)
        try:
            async for response in calls.answers(request_iterator):
                yield response
        finally:
            self._streams.discard(calls)

    def end_streams(self) -> None:
        """No stream takes more calls, so that each ends when those under way are answered."""
        for calls in self._streams:
            calls.end()

    async def reap(self) -> NoReturn:
        """Closes expired sessions, for as long as the server runs."""
        while True:
            await asyncio.sleep(min(self._description.session_ttl_seconds / 4, 5.0))
            for session in self._sessions.expire():
                _log.warning("session %s expired: no call for its time-to-live", session.session_id)
                self._release(session)

    def stop(self) -> None:
        """Cancels what still runs; the workers are killed by their pool."""
        for task in self._running:
            task.cancel()

    def _begin(
        self,
        session: _Session,
        call: Call[Outcome],
        run: Callable[[], Awaitable[Any]],
        respond: Callable[[Any], tuple[Response, bool]],
    ) -> Outcome:
        return self._spawn(
            self._run(session, call, run, respond), name=f"call of session {session.session_id}"
        )

    async def _run(
        self,
        session: _Session,
        call: Call[Outcome],
        run: Callable[[], Awaitable[Any]],
        respond: Callable[[Any], tuple[Response, bool]],
    ) -> Response | EnvironmentFault:
        """One call to its end. A fault ends the session, unless it keeps nothing that could be spoilt."""
        try:
            response, done = respond(await run())
        except EnvironmentFault as fault:
            _log.warning(
                "session %s on %s: %s fault: %s", session.session_id, session.task, fault.kind, fault
            )
            return self._fail(session, call, fault)
        except Exception as error:  # noqa: BLE001  the boundary to what nobody foresaw: the server serves others
            _log.exception("a call of session %s on %s failed", session.session_id, session.task)
            return self._fail(
                session, call, EnvironmentFault(f"the server failed: {type(error).__name__}: {error}")
            )
        self._sessions.answer(session, call, done=done)
        return response

    def _fail(self, session: _Session, call: Call[Outcome], fault: EnvironmentFault) -> EnvironmentFault:
        if self._sessions.fail(session, call, recoverable=not self._host.keeps_state):
            self._release(session)
        return fault

    async def _outcome(self, call: Call[Outcome], context: _Context) -> Response:
        assert call.outcome is not None
        outcome = await asyncio.shield(call.outcome)
        if isinstance(outcome, EnvironmentFault):
            code = grpc.StatusCode.INTERNAL
            if isinstance(outcome, WorkerTimeout | PoolBusy):
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            await context.abort(code, str(outcome), ((FAULT_KEY, str(outcome.kind)),))
        return outcome

    def _release(self, session: _Session) -> None:
        if session.owner is not None:
            self._spawn(session.owner.close(), name=f"close of session {session.session_id}")

    def _spawn(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        task = self._group.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _seconds(self, context: _Context) -> float:
        """How long the environment's code may take, so that its answer still reaches the caller."""
        remaining = context.time_remaining()
        if remaining is None:
            return self._call_seconds
        seconds = min(self._call_seconds, remaining - min(0.25, 0.1 * remaining))
        if seconds < 0.01:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"{remaining:.3f} s are left, which is too short to begin",
                ((FAULT_KEY, str(FaultKind.INFRASTRUCTURE)),),
            )
        return seconds

    async def _check_session_id(self, session_id: str, context: _Context) -> None:
        if not 0 < len(session_id) <= _MAX_ID_CHARACTERS:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"session_id has {len(session_id)} characters; expected 1 to {_MAX_ID_CHARACTERS}",
            )

    async def _check_task(self, task: Task, context: _Context) -> None:
        splits = self._description.splits
        size = splits.get(task.split)
        if task.environment != self._description.name or size is None or 0 < size <= task.index:
            known = ", ".join(
                f"{name} 0..{count - 1}" if count else name for name, count in sorted(splits.items())
            )
            await context.abort(
                grpc.StatusCode.OUT_OF_RANGE, f"no {task}; {self._description.name} has {known}"
            )


def _first_observation(messages: tuple[Message, ...]) -> tuple[pb.ResetResponse, bool]:
    response = wire.reset_to_wire(messages)
    _read_as_a_driver(wire.reset_from_wire, response)
    return response, False


def _step_result(result: StepResult) -> tuple[pb.StepResponse, bool]:
    response = wire.result_to_wire(result)
    _read_as_a_driver(wire.result_from_wire, response)
    return response, result.done


def _read_as_a_driver(read: Callable[[Any], object], response: Response) -> None:
    """What no driver would accept is a fault of the environment, and is told as one."""
    try:
        read(response)
    except ProtocolError as error:
        raise EnvironmentFault(f"the environment gave something else than it should: {error}") from error


async def _refuse(context: _Context, refused: SessionRefused) -> NoReturn:
    await context.abort(_CODES[refused.refusal], str(refused))
    raise AssertionError("abort raises")
