"""A client of the actors' service that does as it is told, right or wrong, one call at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Self

from penstock import PROTOCOL, rpc
from penstock.codec import lease_from_wire, trajectory_item, version_from_wire, version_to_wire
from penstock.rpc import to_duration
from penstock.trajectory import Lease, PolicyVersion, Trajectory
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import coordinator_pb2_grpc

CALL_SECONDS = 60.0


class RawActor:
    def __init__(self, address: str, name: str = "raw") -> None:
        self._name = name
        self._channel = rpc.channel(address)
        self.stub = coordinator_pb2_grpc.CoordinatorServiceStub(self._channel)
        self.session_id = ""
        self.version = PolicyVersion(0, 0)
        self.digest = ""

    async def __aenter__(self) -> Self:
        await self.join()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def join(self, *, held: Sequence[str] = ()) -> None:
        """Joins, and takes the newest version for installed."""
        request = pb.JoinRequest(
            actor_id=self._name, protocol=PROTOCOL, engine="raw", num_slots=1, lease_ids=held
        )
        self.session_id = (await self.stub.Join(request, timeout=CALL_SECONDS)).session_id
        watch = self.stub.Watch(pb.WatchRequest(session_id=self.session_id), timeout=CALL_SECONDS)
        async for directive in watch:
            if directive.HasField("version"):
                self.version = version_from_wire(directive.version.version)
                self.digest = directive.version.digest
                break
        watch.cancel()

    async def acquire(self, num_leases: int) -> list[Lease]:
        request = pb.AcquireLeasesRequest(
            session_id=self.session_id,
            max_leases=num_leases,
            installed=version_to_wire(self.version),
            installed_digest=self.digest,
            wait=to_duration(10.0),
        )
        answer = await self.stub.AcquireLeases(request, timeout=CALL_SECONDS)
        return [lease_from_wire(lease) for lease in answer.leases]

    async def beat(self, leases: Iterable[Lease]) -> None:
        progress = [pb.LeaseProgress(lease_id=lease.lease_id, num_tokens=1) for lease in leases]
        request = pb.HeartbeatRequest(
            session_id=self.session_id, installed=version_to_wire(self.version), progress=progress
        )
        await self.stub.Heartbeat(request, timeout=CALL_SECONDS)

    async def submit(self, *messages: Sequence[pb.SubmitItem]) -> list[pb.SubmitResponse]:
        """One stream of these messages, and its answers. Raises AioRpcError."""

        async def requests() -> AsyncIterator[pb.SubmitRequest]:
            for items in messages:
                yield pb.SubmitRequest(session_id=self.session_id, items=items)

        return [answer async for answer in self.stub.Submit(requests(), timeout=CALL_SECONDS)]


def item(sequence: int, trajectory: Trajectory) -> pb.SubmitItem:
    made = trajectory_item(trajectory)
    made.sequence = sequence
    return made
