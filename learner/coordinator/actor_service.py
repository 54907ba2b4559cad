"""What actors call: protos/penstock/v1/coordinator.proto over the scheduler."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from learner.config import FleetConfig
from learner.coordinator.broadcasts import Broadcasts
from learner.coordinator.core import Coordinator, wait_until
from learner.coordinator.fleet import ActorInfo, EnvironmentUse, ReportedStats, WeightsUse
from learner.coordinator.intake import Intake
from learner.coordinator.leases import RolloutReport
from learner.coordinator.publications import Publications
from learner.coordinator.refusals import refusals
from learner.coordinator.streams import Piece
from penstock import PROTOCOL
from penstock.codec import install_mode_to_wire, lease_to_wire, version_from_wire, version_to_wire
from penstock.errors import ProtocolError
from penstock.rpc import to_duration, to_seconds
from penstock.trajectory import Lease, PolicyVersion
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import coordinator_pb2_grpc, weights_pb2
from penstock.waits import WaitSummary
from penstock.weights.manifest import WeightsMedium

MAX_LEASE_WAIT_SECONDS = 30.0
MAX_WAITS = 8
"""That an actor may tell of in one heartbeat."""
MAX_MEDIA, MAX_MEDIUM_NAME = 16, 60


@dataclass(frozen=True, slots=True)
class Welcome:
    """What every actor is told when it joins."""

    run_id: str
    environments: Sequence[pb.EnvironmentEndpoint]
    policy_files: weights_pb2.PolicyFiles
    config: FleetConfig
    truncation_reward: float | None

    def to(self, session_id: str) -> pb.JoinResponse:
        return pb.JoinResponse(
            session_id=session_id,
            run_id=self.run_id,
            heartbeat_interval=to_duration(self.config.heartbeat_seconds),
            policy_files=self.policy_files,
            environments=self.environments,
            credits=self.credits,
            reset_timeout=to_duration(self.config.reset_timeout_seconds),
            step_timeout=to_duration(self.config.step_timeout_seconds),
            truncation_reward=self.truncation_reward,
            install_mode=install_mode_to_wire(self.config.install_mode),
            stream_tokens=self.config.stream_tokens,
        )

    @property
    def credits(self) -> pb.Credits:
        return pb.Credits(
            num_trajectories=self.config.credit_trajectories, num_bytes=self.config.credit_bytes
        )


class ActorService(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Sessions, directives, leases and submissions."""

    def __init__(
        self,
        coordinator: Coordinator,
        publications: Publications,
        broadcasts: Broadcasts,
        welcome: Welcome,
    ) -> None:
        self._coordinator = coordinator
        self._broadcasts = broadcasts
        self._scheduler = coordinator.scheduler
        self._publications = publications
        self._welcome = welcome
        self._intake = Intake(coordinator, welcome.credits)

    async def Join(  # noqa: N802
        self, request: pb.JoinRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.JoinResponse:
        async with refusals(context):
            _check_join(request)
            info = ActorInfo(
                actor_id=request.actor_id,
                engine=request.engine,
                num_slots=request.num_slots,
                address=request.address,
                hostname=request.hostname,
                pid=request.pid,
                device=request.device,
                weights_medium=WeightsMedium(request.weights_medium or WeightsMedium.PULL),
            )
            session_id = uuid.uuid4().hex
            installed = version_from_wire(request.installed) if request.HasField("installed") else None
            self._scheduler.join(
                session_id, info, request.lease_ids, self._coordinator.clock(), installed=installed
            )
            await self._coordinator.commit()
            return self._welcome.to(session_id)

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WatchResponse]:
        async with refusals(context):
            session = self._scheduler.fleet.require(request.session_id, self._coordinator.clock())
            sent, invited, held, is_told = None, "", None, False
            while not self._coordinator.stop.is_set():
                change = self._coordinator.news.next()
                hold = self._scheduler.evaluations.held_by(request.session_id)
                if hold != held or not is_told:
                    # Before the version that would make it go on.
                    held, is_told = hold, True
                    yield pb.WatchResponse(hold=self._hold(hold))
                manifest = self._publications.newest
                if manifest is not None and manifest is not sent:
                    sent = manifest
                    yield pb.WatchResponse(version=manifest)
                invitation = self._broadcasts.invitation(request.session_id)
                if invitation is not None and invitation.group != invited:
                    invited = invitation.group
                    yield pb.WatchResponse(group=invitation)
                for revocation in self._coordinator.take_revocations(request.session_id):
                    revoke = pb.RevokeLeases(lease_ids=[revocation.lease_id], reason=revocation.reason)
                    yield pb.WatchResponse(revoke=revoke)
                if self._scheduler.finished:
                    yield pb.WatchResponse(drain=pb.Drain(reason="the run is finished", finished=True))
                    return
                if self._scheduler.fleet.find(request.session_id) is not session:
                    return
                await wait_until(change, self._coordinator.clock() + 10.0)

    def _hold(self, version: PolicyVersion | None) -> pb.Hold:
        if version is None:
            return pb.Hold()
        manifest = self._publications.get(version)
        if manifest is not None and version != self._scheduler.version:
            manifest = _without_broadcasts(manifest)
        left = self._scheduler.evaluations.seconds_left(self._coordinator.clock())
        return pb.Hold(version=version_to_wire(version), manifest=manifest, limit=to_duration(left))

    async def Heartbeat(  # noqa: N802
        self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.HeartbeatResponse:
        async with refusals(context):
            installed = version_from_wire(request.installed) if request.HasField("installed") else None
            trained = self._scheduler.outages.environments
            self._scheduler.heartbeat(
                request.session_id,
                installed=installed,
                stats=_stats(request.stats),
                progress=[_report(progress) for progress in request.progress],
                now=self._coordinator.clock(),
                waits=[_wait(wait) for wait in request.waits[:MAX_WAITS]],
                num_unacknowledged=request.num_unacknowledged,
                uses=[_use(use) for use in request.environments if use.name in trained],
                weights=_weights(request.weights),
            )
            newest = self._scheduler.version
            return pb.HeartbeatResponse(
                newest=None if newest is None else version_to_wire(newest),
                held=self._keep_pieces(request),
            )

    def _keep_pieces(self, request: pb.HeartbeatRequest) -> list[pb.HeldPieces]:
        pieces = [
            Piece(piece.lease_id, piece.start, piece.partial, piece.checksum) for piece in request.pieces
        ]
        held = self._scheduler.keep_pieces(request.session_id, pieces, self._coordinator.clock())
        return [
            pb.HeldPieces(lease_id=piece.lease_id, num_tokens=number or 0, enough=number is None)
            for piece, number in zip(pieces, held, strict=True)
        ]

    async def AcquireLeases(  # noqa: N802
        self, request: pb.AcquireLeasesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.AcquireLeasesResponse:
        async with refusals(context):
            try:
                return await self._acquire(request)
            finally:
                self._scheduler.asks_no_more(request.session_id)

    async def _acquire(self, request: pb.AcquireLeasesRequest) -> pb.AcquireLeasesResponse:
        clock = self._coordinator.clock
        deadline = clock() + min(to_seconds(request.wait), MAX_LEASE_WAIT_SECONDS)
        installed = version_from_wire(request.installed)
        while True:
            change = self._coordinator.news.next()
            leases, reason = self._scheduler.acquire(
                request.session_id, installed, request.installed_digest, request.max_leases, clock()
            )
            if leases:
                await self._coordinator.commit()
                return pb.AcquireLeasesResponse(leases=[self._to_wire(lease) for lease in leases])
            outdated = installed != self._scheduler.version
            if outdated or self._coordinator.stop.is_set() or not await wait_until(change, deadline):
                return pb.AcquireLeasesResponse(reason=reason)

    def _to_wire(self, lease: Lease) -> pb.Lease:
        """With what another actor played of it, which is on disk by now, unless its group is gone."""
        message = lease_to_wire(lease)
        if lease.continues:
            kept = self._coordinator.ledger.partial(lease.group_id, lease.slot)
            if kept is not None:
                message.partial, message.partial_checksum = kept
        return message

    async def Submit(  # type: ignore[override]  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.SubmitRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        async with refusals(context):
            await self._intake.run(request_iterator, context)

    async def Leave(  # noqa: N802
        self, request: pb.LeaveRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.LeaveResponse:
        async with refusals(context):
            self._scheduler.leave(request.session_id, request.reason, self._coordinator.clock())
            await self._coordinator.commit()
            return pb.LeaveResponse()


def _without_broadcasts(manifest: weights_pb2.WeightManifest) -> weights_pb2.WeightManifest:
    """Of a version that was broadcast before: it does not come that way again."""
    pulled = weights_pb2.WeightManifest()
    pulled.CopyFrom(manifest)
    media = [medium for medium in manifest.media if not medium.HasField("collective")]
    del pulled.media[:]
    pulled.media.extend(media)
    return pulled


def _check_join(request: pb.JoinRequest) -> None:
    if request.protocol != PROTOCOL:
        raise ProtocolError(
            f"the actor speaks protocol {request.protocol}, this learner {PROTOCOL}: install the same penstock"
        )
    if not request.actor_id or len(request.actor_id) > 200 or request.num_slots == 0:
        raise ProtocolError(
            f"actor_id is {request.actor_id[:40]!r} and num_slots {request.num_slots}; expected a name of at most "
            "200 characters and at least one slot"
        )
    if request.weights_medium and request.weights_medium not in list(WeightsMedium):
        raise ProtocolError(
            f"weights_medium is {request.weights_medium[:40]!r}; expected {', '.join(WeightsMedium)}, or nothing"
        )


def _wait(wait: pb.ActorWait) -> WaitSummary:
    return WaitSummary(
        what=wait.what[:100],
        owner=wait.owner[:200],
        count=wait.count,
        longest_seconds=to_seconds(wait.longest),
        limit_seconds=to_seconds(wait.limit),
    )


def _report(progress: pb.LeaseProgress) -> RolloutReport:
    waits = to_seconds(progress.environment_wait) if progress.HasField("environment_wait") else 0.0
    return RolloutReport(progress.lease_id, progress.num_tokens, progress.num_turns, waits)


def _use(use: pb.EnvironmentUse) -> EnvironmentUse:
    return EnvironmentUse(use.name, use.num_answers, to_seconds(use.waited))


def _weights(use: pb.WeightsUse) -> WeightsUse:
    counts = {medium[:MAX_MEDIUM_NAME]: count for medium, count in use.num_versions.items()}
    return WeightsUse(
        medium=use.medium[:MAX_MEDIUM_NAME],
        num_versions=dict(sorted(counts.items(), key=lambda item: -item[1])[:MAX_MEDIA]),
    )


def _stats(stats: pb.EngineStats) -> ReportedStats:
    return ReportedStats(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_tokens=stats.num_tokens,
        tokens_per_second=stats.tokens_per_second,
        num_installs=stats.num_installs,
        max_install_seconds=stats.max_install_seconds,
    )
