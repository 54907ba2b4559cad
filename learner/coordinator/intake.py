"""One actor's stream of submissions: read, decide, commit, acknowledge.

A message is decided upon while those before it are being written; acknowledgements are
sent in order, each once everything up to it is on disk. Messages of one commit share an
acknowledgement: sending one costs as much processor time as deciding on a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import grpc

from learner.coordinator import submissions
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import Verdict
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.partials import SentPartial
from learner.coordinator.records import TrajectoryState
from learner.coordinator.submissions import Sent, Submission
from learner.coordinator.validation import Rejected, RejectionCode
from penstock.errors import PenstockError
from penstock.tasks import task_group
from penstock.v1 import coordinator_pb2 as pb

MAX_UNWRITTEN_MESSAGES = 64
"""Of all actors together, decided upon and not on disk yet. Further ones wait unread."""
_MAX_AHEAD = 32
"""Messages of one stream that are decided upon and not acknowledged."""

_STATE_KIND = {
    TrajectoryState.PENDING: pb.VERDICT_KIND_ACCEPTED,
    TrajectoryState.STALE: pb.VERDICT_KIND_STALE,
    TrajectoryState.SURPLUS: pb.VERDICT_KIND_SURPLUS,
    TrajectoryState.QUARANTINED: pb.VERDICT_KIND_QUARANTINED,
}
_CODES = {code: pb.RejectionCode.Value(f"REJECTION_CODE_{code.name}") for code in RejectionCode}
_OUTCOMES = {
    pb.RELEASE_REASON_DRAINING: LeaseOutcome.DRAINED,
    pb.RELEASE_REASON_INFRASTRUCTURE: LeaseOutcome.INFRASTRUCTURE,
    pb.RELEASE_REASON_DATA: LeaseOutcome.DATA,
    pb.RELEASE_REASON_REVOKED: LeaseOutcome.REVOKED,
    pb.RELEASE_REASON_ENGINE: LeaseOutcome.ENGINE,
}

_Context = grpc.aio.ServicerContext[Any, Any]


class _Decided(NamedTuple):
    written: asyncio.Future[None]
    answer: pb.SubmitResponse

    @property
    def is_on_disk(self) -> bool:
        return self.written.done() and self.written.exception() is None


class Intake:
    """Takes in the streams of all actors."""

    def __init__(self, coordinator: Coordinator, granted: pb.Credits) -> None:
        self._coordinator = coordinator
        self._scheduler = coordinator.scheduler
        self._credits = granted
        self._room = asyncio.Semaphore(MAX_UNWRITTEN_MESSAGES)

    async def run(self, requests: AsyncIterator[pb.SubmitRequest], context: _Context) -> None:
        """Until the actor ends its stream. Raises SessionFenced, PeerLost, ProtocolError, LedgerError.

        What was decided before such an error is acknowledged first.
        """
        decided: asyncio.Queue[_Decided | None] = asyncio.Queue(_MAX_AHEAD)
        problem: PenstockError | None = None
        try:
            async with task_group() as tasks:
                tasks.create_task(self._acknowledge(decided, context), name="acknowledge")
                try:
                    await self._decide_messages(requests, decided)
                except PenstockError as error:
                    problem = error
                await decided.put(None)
        except PenstockError as error:
            problem = error
        if problem is not None:
            raise problem

    async def _decide_messages(
        self, requests: AsyncIterator[pb.SubmitRequest], decided: asyncio.Queue[_Decided | None]
    ) -> None:
        session_id = ""
        async for request in requests:
            session_id = session_id or request.session_id
            await self._room.acquire()
            try:
                answer = self._decide(session_id, request)
                written = self._coordinator.begin_commit()
            except BaseException:
                self._room.release()
                raise
            written.add_done_callback(self._make_room)
            await decided.put(_Decided(written, answer))

    def _make_room(self, written: asyncio.Future[None]) -> None:
        self._room.release()
        if not written.cancelled():
            written.exception()  # of several that fail one is raised; asyncio would log the others as forgotten

    async def _acknowledge(self, decided: asyncio.Queue[_Decided | None], context: _Context) -> None:
        message = await decided.get()
        while message is not None:
            await message.written
            answer = message.answer
            is_taken = False
            while not is_taken and not decided.empty():
                message = decided.get_nowait()
                is_taken = message is None or not message.is_on_disk
                if message is not None and not is_taken:
                    answer.acknowledged = message.answer.acknowledged
                    answer.verdicts.extend(message.answer.verdicts)
            await context.write(answer)
            if not is_taken:
                message = await decided.get()

    def _decide(self, session_id: str, request: pb.SubmitRequest) -> pb.SubmitResponse:
        now = self._coordinator.clock()
        kinds = [item.WhichOneof("item") for item in request.items]
        sent = [
            Sent(item.trajectory, item.checksum)
            for kind, item in zip(kinds, request.items, strict=True)
            if kind == "trajectory"
        ]
        read = iter(submissions.read(sent, self._scheduler.limits))
        verdicts = [
            self._decide_on(session_id, item, next(read) if kind == "trajectory" else None, now)
            for kind, item in zip(kinds, request.items, strict=True)
        ]
        acknowledged = self._scheduler.fleet.require(session_id, now).last_sequence
        return pb.SubmitResponse(acknowledged=acknowledged, verdicts=verdicts, credits=self._credits)

    def _decide_on(
        self, session_id: str, item: pb.SubmitItem, submission: Submission | Rejected | None, now: float
    ) -> pb.Verdict:
        sequence = item.sequence
        if submission is not None:
            return _to_wire(sequence, self._scheduler.docket.submit(session_id, sequence, submission, now))
        release = item.release
        if item.HasField("release") and release.reason in _OUTCOMES:
            outcome = _OUTCOMES[release.reason]
            partial = SentPartial(release.partial, item.checksum) if release.partial else None
            self._scheduler.docket.release(
                session_id, sequence, release.lease_id, outcome, release.message, now, partial
            )
            return pb.Verdict(sequence=sequence, kind=pb.VERDICT_KIND_ACCEPTED)
        message = "expected a trajectory, or a release with a reason"
        return _to_wire(
            sequence, self._scheduler.docket.reject(session_id, sequence, RejectionCode.EMPTY, message, now)
        )


def _to_wire(sequence: int, verdict: Verdict) -> pb.Verdict:
    if verdict.state is not None:
        return pb.Verdict(sequence=sequence, kind=_STATE_KIND[verdict.state], message=verdict.message)
    if verdict.code is not None:
        return pb.Verdict(
            sequence=sequence,
            kind=pb.VERDICT_KIND_REJECTED,
            code=_CODES[verdict.code],
            message=verdict.message,
        )
    return pb.Verdict(sequence=sequence, kind=pb.VERDICT_KIND_DUPLICATE)
