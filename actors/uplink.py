"""Sends what rollouts made to the learner, and keeps it until it is acknowledged.

The spool is bounded in bytes: a rollout that ends while it is full waits. Items are
numbered 1, 2, 3, ... within a session; after a new session the unacknowledged ones are
numbered afresh, and the trajectories' own ids make sending them again harmless. What
arrived with other bytes than were sent is sent again, as a new item.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from actors.session import Session, translate
from penstock.codec import checksum
from penstock.errors import PeerLost, PenstockError
from penstock.history import History
from penstock.v1 import coordinator_pb2 as pb

_log = logging.getLogger(__name__)

_ITEMS_PER_MESSAGE = 32
_BYTES_PER_MESSAGE = 4 * 1024 * 1024
_GATHER_SECONDS = 0.03
"""For rollouts that end together: a message costs both ends as much as several trajectories in it."""
_ACK_SECONDS = 30.0

_Call = grpc.aio.StreamStreamCall[pb.SubmitRequest, pb.SubmitResponse]


@dataclass(frozen=True, slots=True)
class _Spooled:
    lease_id: str
    item: pb.SubmitItem
    num_bytes: int


class Uplink:
    """A bounded spool, and the stream that empties it."""

    def __init__(
        self, session: Session, granted: pb.Credits, *, max_bytes: int, history: History | None = None
    ) -> None:
        self._session = session
        self._history = history
        self._credits = granted
        self._max_bytes = max_bytes
        self._items: deque[_Spooled] = deque()
        self._num_bytes = 0
        self._acknowledged = 0
        self._sent = 0
        self._bytes_in_flight = 0
        """Of items that are sent and not acknowledged."""
        self._numbered_for = ""
        self._num_streams = 0
        self._closing = False
        self._changed = asyncio.Condition()
        self.verdicts: Counter[str] = Counter()

    @property
    def num_unacknowledged(self) -> int:
        return len(self._items)

    def held_leases(self) -> list[str]:
        """Leases whose items are not acknowledged yet."""
        return [spooled.lease_id for spooled in self._items]

    async def put(self, lease_id: str, item: pb.SubmitItem) -> bool:
        """Spools the item that ends a lease; False if the uplink was closed before there was room.

        Waits while the spool is full. The session's patience bounds that wait, and `close` ends it.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_bytes < self._max_bytes or self._closing)
            if self._closing:
                return False
            self._append(_Spooled(lease_id, item, item.ByteSize()))
            return True

    def _append(self, spooled: _Spooled) -> None:
        self._items.append(spooled)
        self._num_bytes += spooled.num_bytes
        self._changed.notify_all()

    async def flush(self, seconds: float) -> bool:
        """Waits until everything is acknowledged; False if that took longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: not self._items)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Takes no more items; lets `run` end, once what is spooled is sent and acknowledged."""
        async with self._changed:
            self._closing = True
            self._changed.notify_all()

    async def run(self) -> None:
        """Streams until closed. Raises SessionFenced, LearnerUnreachable, ProtocolError."""
        patience = self._session.patience_seconds
        given_up_at = time.monotonic() + patience
        while True:
            session_id, acknowledged = self._session.session_id, self._acknowledged
            had_nothing_to_send = not self._items
            try:
                await self._stream(session_id)
                problem: PenstockError = PeerLost("the learner closed the stream")
            except grpc.aio.AioRpcError as error:
                problem = translate(error)
            except PeerLost as lost:
                problem = lost
            if self._closing and not self._items:
                return
            if had_nothing_to_send or self._acknowledged != acknowledged:
                given_up_at = time.monotonic() + patience
            _log.info("uplink: %s; sending again what is unacknowledged", problem)
            if self._history is not None:
                note = self._history.unknown if isinstance(problem, PeerLost) else self._history.fail
                note(session_id, str(problem))
            await self._session.recover(problem, session_id, given_up_at)

    async def _stream(self, session_id: str) -> None:
        """One stream, from the first unacknowledged item on. Returns when the learner ends it."""
        if session_id != self._numbered_for:
            self._numbered_for, self._acknowledged = session_id, 0
        self._sent, self._bytes_in_flight = self._acknowledged, 0
        self._num_streams += 1
        call: _Call = self._session.stub.Submit(self._requests(session_id, self._num_streams))
        try:
            while (response := await self._read(call)) is not None:
                if self._history is not None:
                    self._history.ok(session_id, response)
                await self._acknowledge(response)
        finally:
            call.cancel()

    async def _read(self, call: _Call) -> pb.SubmitResponse | None:
        """The next answer; None at the stream's end. Raises PeerLost if one is overdue."""
        reading = asyncio.ensure_future(call.read())
        while True:
            before = self._sent
            done, _ = await asyncio.wait([reading], timeout=_ACK_SECONDS)
            if done:
                answer = reading.result()
                return answer if isinstance(answer, pb.SubmitResponse) else None
            if before > self._acknowledged:
                reading.cancel()
                raise PeerLost(f"no acknowledgement for {_ACK_SECONDS:.0f} s")

    async def _requests(self, session_id: str, stream: int) -> AsyncIterator[pb.SubmitRequest]:
        """Messages of unsent items, as far as the credits reach; ends when closing and all is answered.

        gRPC may still wait here after its stream ended: a newer stream ends it.
        """
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._may_send() or self._is_over(stream))
            if len(self._items) - (self._sent - self._acknowledged) < _ITEMS_PER_MESSAGE:
                await asyncio.sleep(_GATHER_SECONDS)
            async with self._changed:
                if self._is_over(stream):
                    return
                items = self._take()
            if self._history is not None:
                self._history.invoke(session_id, items)
            yield pb.SubmitRequest(session_id=session_id, items=items)

    def _may_send(self) -> bool:
        """Whether the credits reach for another item; for one they always do, however large."""
        in_flight = self._sent - self._acknowledged
        if in_flight >= min(len(self._items), self._credits.num_trajectories):
            return False
        return (
            in_flight == 0
            or self._bytes_in_flight + self._items[in_flight].num_bytes <= self._credits.num_bytes
        )

    def _is_over(self, stream: int) -> bool:
        return stream != self._num_streams or (self._closing and not self._items)

    def _take(self) -> list[pb.SubmitItem]:
        """The next items, numbered; at least one, then as many as credits and sizes allow."""
        in_flight = self._sent - self._acknowledged
        room = self._credits.num_bytes - self._bytes_in_flight
        last = min(len(self._items), self._credits.num_trajectories, in_flight + _ITEMS_PER_MESSAGE)
        taken: list[pb.SubmitItem] = []
        num_bytes = 0
        for spooled in itertools.islice(self._items, in_flight, last):
            num_bytes += spooled.num_bytes
            if taken and num_bytes > min(room, _BYTES_PER_MESSAGE):
                break
            self._sent += 1
            self._bytes_in_flight += spooled.num_bytes
            spooled.item.sequence = self._sent
            taken.append(spooled.item)
        return taken

    async def _acknowledge(self, response: pb.SubmitResponse) -> None:
        corrupt = {v.sequence for v in response.verdicts if v.code == pb.REJECTION_CODE_CORRUPT}
        async with self._changed:
            while self._acknowledged < response.acknowledged and self._items:
                spooled = self._items.popleft()
                self._num_bytes -= spooled.num_bytes
                if self._acknowledged < self._sent:
                    self._bytes_in_flight -= spooled.num_bytes
                self._acknowledged += 1
                if self._acknowledged in corrupt and _is_whole(spooled.item):
                    self._append(spooled)
            # What a stream before this one brought need not be sent again.
            self._sent = max(self._sent, self._acknowledged)
            self._credits = response.credits
            self._changed.notify_all()
        for verdict in response.verdicts:
            kind = pb.VerdictKind.Name(verdict.kind).removeprefix("VERDICT_KIND_").lower()
            self.verdicts[kind] += 1
            if verdict.kind == pb.VERDICT_KIND_REJECTED:
                code = pb.RejectionCode.Name(verdict.code)
                _log.warning("the learner rejected an item: %s: %s", code, verdict.message)


def _is_whole(item: pb.SubmitItem) -> bool:
    """Whether the bytes here are still those that the checksum was made of: then the way changed them."""
    return checksum(item.trajectory) == item.checksum
