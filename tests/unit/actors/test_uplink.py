"""The uplink against a real gRPC server that loses streams and acknowledgements."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from actors import uplink as uplinks
from actors.session import Identity, Session
from actors.uplink import Uplink
from penstock import PROTOCOL, rpc
from penstock.codec import checksum
from penstock.errors import SessionFenced
from penstock.signals import Stop
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import coordinator_pb2_grpc

CREDITS = pb.Credits(num_trajectories=4, num_bytes=1 << 20)


class Learner(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Acknowledges a prefix, as told; counts what it stored by session."""

    def __init__(self) -> None:
        self.sessions: list[str] = []
        self.stored: dict[str, list[str]] = {}
        self.breaks_after: list[int] = []
        self.abort_with: grpc.StatusCode | None = None
        self.corrupt: set[int] = set()
        self.payloads: list[bytes] = []
        self.num_messages = 0
        self.received = asyncio.Event()
        self.holding = asyncio.Event()
        self.holding.set()

    async def Join(self, request, context):  # type: ignore[no-untyped-def]
        self.sessions.append(f"s{len(self.sessions)}")
        self.stored[self.sessions[-1]] = []
        return pb.JoinResponse(session_id=self.sessions[-1], credits=CREDITS)

    async def Submit(self, request_iterator, context):  # type: ignore[no-untyped-def]
        if self.abort_with is not None:
            await context.abort(self.abort_with, "as told")
        limit = self.breaks_after.pop(0) if self.breaks_after else None
        async for request in request_iterator:
            if request.session_id != self.sessions[-1]:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "unknown session")
            stored = self.stored[request.session_id]
            self.num_messages += 1
            for item in request.items:
                if item.sequence == len(stored) + 1:
                    stored.append(item.release.lease_id)
                    if item.trajectory:
                        self.payloads.append(item.trajectory)
            self.received.set()
            if limit is not None and len(stored) >= limit:
                return  # stored, but never acknowledged
            await self.holding.wait()
            verdicts = [
                pb.Verdict(
                    sequence=item.sequence,
                    kind=pb.VERDICT_KIND_REJECTED,
                    code=pb.REJECTION_CODE_CORRUPT,
                )
                for item in request.items
                if item.sequence in self.corrupt
            ]
            yield pb.SubmitResponse(acknowledged=len(stored), verdicts=verdicts, credits=CREDITS)


@contextlib.asynccontextmanager
async def running(learner: Learner, *, max_bytes: int = 1 << 20) -> AsyncIterator[Uplink]:
    server = rpc.server()
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(learner, server)
    port = rpc.bind(server, "127.0.0.1:0")
    identity = Identity(
        actor_id="a", engine="fake", num_slots=1, address="", hostname="h", pid=1, device="cpu"
    )
    async with rpc.serving(server, grace_seconds=0):
        session = Session(
            f"127.0.0.1:{port}", identity, Stop(), protocol=PROTOCOL, patience_seconds=20.0, held_leases=list
        )
        await session.join(connect_seconds=20.0)
        try:
            yield Uplink(session, CREDITS, max_bytes=max_bytes)
        finally:
            await session.close()


def item(name: str) -> tuple[str, pb.SubmitItem]:
    return name, pb.SubmitItem(release=pb.Release(lease_id=name, reason=pb.RELEASE_REASON_DRAINING))


async def send(uplink: Uplink, names: list[str]) -> None:
    task = asyncio.create_task(uplink.run())
    for name in names:
        await uplink.put(*item(name))
    assert await uplink.flush(20.0)
    await uplink.close()
    await task


async def test_what_is_put_arrives_in_order():
    learner = Learner()
    async with running(learner) as uplink:
        await send(uplink, ["1", "2", "3"])
    assert learner.stored == {"s0": ["1", "2", "3"]}
    assert uplink.num_unacknowledged == 0


async def test_items_that_come_together_share_a_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uplinks, "_GATHER_SECONDS", 0.5)
    learner = Learner()
    async with running(learner) as uplink:
        task = asyncio.create_task(uplink.run())
        for name in ("1", "2", "3"):
            await uplink.put(*item(name))
            await asyncio.sleep(0.02)
        assert await uplink.flush(20.0)
        await uplink.close()
        await task
    assert learner.stored == {"s0": ["1", "2", "3"]}
    assert learner.num_messages == 1


async def test_what_was_not_acknowledged_is_sent_again():
    learner = Learner()
    learner.breaks_after = [2, 3, 5]
    names = [str(n) for n in range(8)]
    async with running(learner) as uplink:
        await send(uplink, names)
    assert learner.stored == {"s0": names}


async def test_a_new_session_numbers_its_items_afresh():
    learner = Learner()
    async with running(learner) as uplink:
        learner.sessions.append("restarted")  # the learner forgot the session
        learner.stored["restarted"] = []
        await send(uplink, ["1", "2"])
    assert learner.stored[learner.sessions[-1]] == ["1", "2"]


async def test_no_more_is_in_flight_than_the_credits_allow():
    learner = Learner()
    learner.holding.clear()
    async with running(learner) as uplink:
        task = asyncio.create_task(uplink.run())
        for n in range(10):
            await uplink.put(*item(str(n)))
        await learner.received.wait()
        await asyncio.sleep(0.1)  # time enough to send too much
        assert len(learner.stored["s0"]) <= CREDITS.num_trajectories
        learner.holding.set()
        assert await uplink.flush(20.0)
        await uplink.close()
        await task
    assert learner.stored["s0"] == [str(n) for n in range(10)]


async def test_a_full_spool_holds_back_who_fills_it():
    async with running(Learner(), max_bytes=1) as uplink:
        await uplink.put(*item("1"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await uplink.put(*item("2"))
        assert uplink.held_leases() == ["1"]


async def test_who_waits_for_room_is_turned_away_when_the_uplink_closes():
    async with running(Learner(), max_bytes=1) as uplink:
        assert await uplink.put(*item("1"))
        waiting = asyncio.create_task(uplink.put(*item("2")))
        await asyncio.sleep(0)
        await uplink.close()
        async with asyncio.timeout(20.0):
            assert not await waiting
        assert uplink.held_leases() == ["1"]


async def test_what_changed_on_the_way_is_sent_again_but_not_what_changed_here():
    learner = Learner()
    learner.corrupt = {1, 2}
    payload = b"a trajectory"
    whole = pb.SubmitItem(trajectory=payload, checksum=checksum(payload))
    spoiled = pb.SubmitItem(trajectory=b"A trajectory", checksum=checksum(payload))
    async with running(learner) as uplink:
        task = asyncio.create_task(uplink.run())
        await uplink.put("1", whole)
        await uplink.put("2", spoiled)
        await uplink.put(*item("3"))
        assert await uplink.flush(20.0)
        await uplink.close()
        await task
    assert learner.payloads == [payload, b"A trajectory", payload]
    assert uplink.verdicts["rejected"] == 2


async def test_a_fenced_session_ends_the_uplink():
    learner = Learner()
    learner.abort_with = grpc.StatusCode.ABORTED
    async with running(learner) as uplink:
        await uplink.put(*item("1"))
        with pytest.raises(SessionFenced, match="as told"):
            await uplink.run()


async def test_no_more_bytes_are_in_flight_than_the_credits_allow():
    learner = Learner()
    learner.holding.clear()
    async with running(learner) as uplink:
        uplink._credits = pb.Credits(num_trajectories=100, num_bytes=2 * item("x" * 40)[1].ByteSize())
        task = asyncio.create_task(uplink.run())
        for number in range(5):
            await uplink.put(*item(str(number) * 40))
        async with asyncio.timeout(20):
            await learner.received.wait()
        await asyncio.sleep(0.3)
        assert len(learner.stored["s0"]) == 2
        learner.holding.set()
        assert await uplink.flush(20.0)
        await uplink.close()
        await task


async def test_what_a_stream_before_brought_is_not_sent_again_once_it_is_acknowledged():
    """The learner had all of it when the stream broke, and says so at the first item that comes again."""
    learner = Learner()
    learner.breaks_after = [4]
    async with running(learner) as uplink:
        task = asyncio.create_task(uplink.run())
        for name in ("1", "2", "3", "4"):
            await uplink.put(*item(name))
        async with asyncio.timeout(20):
            await learner.received.wait()
        uplink._credits = pb.Credits(num_trajectories=1, num_bytes=1)
        assert await uplink.flush(20.0)
        for name in ("5", "6"):
            await uplink.put(*item(name))
        assert await uplink.flush(20.0)
        await uplink.close()
        await task
    assert learner.stored == {"s0": ["1", "2", "3", "4", "5", "6"]}


async def test_a_stream_that_was_quiet_for_longer_than_the_patience_may_break():
    learner = Learner()
    async with running(learner) as uplink:
        uplink._session.patience_seconds = 0.5
        learner.breaks_after = [1]
        task = asyncio.create_task(uplink.run())
        await asyncio.sleep(1.0)
        await uplink.put(*item("1"))
        assert await uplink.flush(20.0)
        await uplink.close()
        await task
    assert learner.stored == {"s0": ["1"]}
