"""What an actor answers to operators: protos/penstock/v1/actor.proto."""

from __future__ import annotations

from typing import Any

import grpc

from actors.service import Actor
from penstock.codec import stats_to_wire, version_to_wire
from penstock.signals import Stop
from penstock.v1 import actor_pb2 as pb
from penstock.v1 import actor_pb2_grpc

SERVICE = "penstock.v1.ActorService"


class ActorOperatorService(actor_pb2_grpc.ActorServiceServicer):
    """Status and drain. Answers "joining" until it is given its actor."""

    def __init__(self, actor_id: str, stop: Stop) -> None:
        self._actor_id = actor_id
        self._stop = stop
        self.actor: Actor | None = None

    async def GetActorStatus(  # noqa: N802
        self, request: pb.GetActorStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetActorStatusResponse:
        actor = self.actor
        if actor is None:
            return pb.GetActorStatusResponse(actor_id=self._actor_id, state="joining")
        installed, stats = actor.installer.installed, actor.engine.stats()
        return pb.GetActorStatusResponse(
            actor_id=self._actor_id,
            session_id=actor.session.session_id,
            state=actor.state,
            installed=None if installed is None else version_to_wire(installed[0]),
            stats=stats_to_wire(stats),
            num_rollouts=actor.num_rollouts,
            num_unacknowledged=actor.uplink.num_unacknowledged,
        )

    async def DrainActor(  # noqa: N802
        self, request: pb.DrainActorRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DrainActorResponse:
        self._stop.set("an operator asked")
        return pb.DrainActorResponse()
