"""Actors without engines: they join, lease, and submit trajectories that cost nothing to make."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence

import numpy as np
from harness.ingest_servers import DIGEST, ITEMS_PER_MESSAGE, SUBMIT, VERSION

from penstock import PROTOCOL, rpc
from penstock.codec import checksum, trajectory_to_wire, version_to_wire
from penstock.trajectory import FinishReason, Reward, Task, Trajectory, VersionSpan
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import coordinator_pb2_grpc, trajectory_pb2

HEARTBEAT_SECONDS = 2.0


class SimulatedActor:
    """One connection of its own, one session, one stream."""

    def __init__(self, address: str, number: int, num_tokens: int) -> None:
        self._channel = rpc.channel(address)
        self._stub = coordinator_pb2_grpc.CoordinatorServiceStub(self._channel)
        self._number = number
        self._num_tokens = num_tokens
        self._num_made = 0
        self._held: list[pb.Lease] = []
        self.session_id = ""
        self.ack_seconds: list[float] = []

    async def join(self) -> None:
        request = pb.JoinRequest(
            actor_id=f"actor-{self._number}", protocol=PROTOCOL, engine="none", num_slots=ITEMS_PER_MESSAGE
        )
        self.session_id = (await self._stub.Join(request, timeout=60)).session_id

    async def lease(self, num_leases: int) -> list[pb.Lease]:
        leases: list[pb.Lease] = []
        while len(leases) < num_leases:
            answer = await self._stub.AcquireLeases(
                pb.AcquireLeasesRequest(
                    session_id=self.session_id,
                    max_leases=min(num_leases - len(leases), 1024),
                    installed=version_to_wire(VERSION),
                    installed_digest=DIGEST,
                ),
                timeout=60,
            )
            assert answer.leases, answer.reason
            leases += answer.leases
        self._held = leases
        return leases

    async def submit(self, num_messages: int, *, seconds_between: float = 0.0) -> None:
        """Leases, submits and awaits the acknowledgement of one message after another."""
        call = self._stub.Submit()
        for number in range(num_messages):
            leases = await self.lease(ITEMS_PER_MESSAGE)
            message = self.message(leases)
            if number and seconds_between:
                await asyncio.sleep(seconds_between)
            began = time.perf_counter()
            await call.write(message)
            check(await call.read(), self._num_made)
            self.ack_seconds.append(time.perf_counter() - began)
            self._held = []
        await call.done_writing()

    def message(self, leases: Sequence[pb.Lease]) -> pb.SubmitRequest:
        items = []
        for lease in leases:
            self._num_made += 1
            items.append(make_item(lease, self._number, self._num_made, self._num_tokens))
        return pb.SubmitRequest(session_id=self.session_id, items=items)

    async def close(self) -> None:
        await self._channel.close()

    async def heartbeat(self) -> None:
        """Says every two seconds that it is there, until cancelled."""
        beats = 0
        await asyncio.sleep(HEARTBEAT_SECONDS * (self._number % 100) / 100)
        while True:
            beats += 1
            progress = [pb.LeaseProgress(lease_id=lease.lease_id, num_tokens=beats) for lease in self._held]
            request = pb.HeartbeatRequest(
                session_id=self.session_id, installed=version_to_wire(VERSION), progress=progress
            )
            await self._stub.Heartbeat(request, timeout=60)
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def watch(self) -> None:
        """Listens to directives, until cancelled."""
        async for _ in self._stub.Watch(pb.WatchRequest(session_id=self.session_id)):
            pass


async def send(address: str, messages: Sequence[bytes], *, window: int) -> float:
    """Sends messages as they are, `window` of them unanswered; seconds to the last answer.

    The same for every server: on this side nothing is serialised while the clock runs.
    """
    async with rpc.channel(address) as channel:
        stream = channel.stream_stream(SUBMIT, response_deserializer=pb.SubmitResponse.FromString)
        room = asyncio.Semaphore(window)

        async def requests() -> AsyncIterator[bytes]:
            for message in messages:
                await room.acquire()
                yield message

        began = time.perf_counter()
        acknowledged = 0
        async for answer in stream(requests()):
            num_messages = len(answer.verdicts) // ITEMS_PER_MESSAGE
            acknowledged += num_messages * ITEMS_PER_MESSAGE
            check(answer, acknowledged)
            for _ in range(num_messages):
                room.release()
            if acknowledged == len(messages) * ITEMS_PER_MESSAGE:
                break
        return time.perf_counter() - began


def check(answer: pb.SubmitResponse, acknowledged: int) -> None:
    kinds = {verdict.kind for verdict in answer.verdicts}
    assert kinds == {pb.VERDICT_KIND_ACCEPTED}, answer.verdicts[0]
    assert answer.acknowledged == acknowledged, (answer.acknowledged, acknowledged)


def make_item(lease: pb.Lease, actor: int, number: int, num_tokens: int) -> pb.SubmitItem:
    message = trajectory_pb2.Trajectory()
    message.CopyFrom(_template(num_tokens))
    message.trajectory_id = f"{actor:016x}{number:016x}"
    message.lease_id = lease.lease_id
    message.task.CopyFrom(lease.task)
    message.observation_digest = f"{lease.group_id:032x}"
    payload = message.SerializeToString()
    return pb.SubmitItem(sequence=number, trajectory=payload, checksum=checksum(payload))


@functools.cache
def _template(num_tokens: int) -> trajectory_pb2.Trajectory:
    """A quarter of prompt, three quarters sampled."""
    sampled = np.ones(num_tokens, dtype=np.uint8)
    sampled[: num_tokens // 4] = 0
    return trajectory_to_wire(
        Trajectory(
            trajectory_id="0" * 32,
            lease_id="",
            token_ids=np.random.default_rng(0).integers(0, 150_000, num_tokens, dtype=np.int32),
            loss_mask=sampled,
            logprobs=np.where(sampled == 1, np.float32(-1.0), np.float32(0.0)),
            versions=(VersionSpan(VERSION, int(sampled.sum())),),
            reward=Reward.valid(1.0),
            finish_reason=FinishReason.DONE,
            num_turns=1,
            task=Task("words", "train", 0, 0),
            environment_version="1",
            environment_digest="ab",
            observation_digest="",
        )
    )
