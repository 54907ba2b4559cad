"""What people and scripts call: protos/penstock/v1/operator.proto."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from google.protobuf import timestamp_pb2

from learner.config import ScheduleConfig
from learner.coordinator.breaker import BreakerState
from learner.coordinator.broadcasts import Broadcasts
from learner.coordinator.core import Coordinator, wait_until
from learner.coordinator.evaluation.status import evaluation_to_wire
from learner.coordinator.fleet import Session
from learner.coordinator.ledger import Totals
from learner.coordinator.records import TrajectoryState
from learner.coordinator.refusals import refusals
from penstock.codec import stats_to_wire, version_to_wire
from penstock.errors import FaultKind
from penstock.rpc import to_duration
from penstock.v1 import coordinator_pb2, operator_pb2_grpc
from penstock.v1 import operator_pb2 as pb


class OperatorService(operator_pb2_grpc.OperatorServiceServicer):
    """Status, events, and the few things an operator may change."""

    def __init__(
        self,
        coordinator: Coordinator,
        broadcasts: Broadcasts,
        schedule: ScheduleConfig,
        environments: Mapping[str, str],
    ) -> None:
        self._coordinator = coordinator
        self._broadcasts = broadcasts
        self._scheduler = coordinator.scheduler
        self._schedule = schedule
        self._environments = environments

    async def GetStatus(  # noqa: N802
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetStatusResponse:
        async with refusals(context):
            coordinator, scheduler = self._coordinator, self._scheduler
            totals = await coordinator.refresh_totals()
            version = scheduler.version
            return pb.GetStatusResponse(
                run_id=coordinator.run_id,
                state=self._state(),
                version=None if version is None else version_to_wire(version),
                num_steps=self._schedule.num_steps,
                max_lag=self._schedule.max_lag,
                actors=[self._actor(session) for session in scheduler.fleet.sessions()],
                ledger=_ledger_to_wire(totals),
                metrics=coordinator.step_metrics,
                waiting_for=coordinator.why()[0],
                uptime=to_duration(coordinator.clock() - coordinator.started_at),
                tokens_per_second=coordinator.tokens_per_second(),
                environments=[self._environment(name, totals) for name in self._environments],
                num_groups_open=len(scheduler.groups),
                actors_wanted=coordinator.actors_wanted(),
                num_handed_over=totals.handed_over,
                num_continued=scheduler.grants.num_continued,
                num_groups_ready=sum(group.is_ready for group in scheduler.groups.values()),
                broadcasts=self._broadcasts.status(),
                evaluation=evaluation_to_wire(scheduler.evaluations, coordinator.clock()),
            )

    async def WatchEvents(  # noqa: N802
        self, request: pb.WatchEventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WatchEventsResponse]:
        async with refusals(context):
            after = request.after
            while True:
                change = self._coordinator.changed.next()
                events = self._coordinator.ledger.events_after(after)
                for sequence, seconds, kind, message in events:
                    after = sequence
                    when = timestamp_pb2.Timestamp()
                    when.FromMilliseconds(round(seconds * 1000))
                    yield pb.WatchEventsResponse(sequence=sequence, time=when, kind=kind, message=message)
                if not events:
                    if not request.follow or self._coordinator.stop.is_set():
                        return
                    await wait_until(change, self._coordinator.clock() + 10.0)

    async def Pause(  # noqa: N802
        self, request: pb.PauseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PauseResponse:
        await self._set_paused(True)
        return pb.PauseResponse()

    async def Resume(  # noqa: N802
        self, request: pb.ResumeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ResumeResponse:
        await self._set_paused(False)
        return pb.ResumeResponse()

    async def Checkpoint(  # noqa: N802
        self, request: pb.CheckpointRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CheckpointResponse:
        self._coordinator.checkpoint_requested = True
        return pb.CheckpointResponse()

    async def Why(  # noqa: N802
        self, request: pb.WhyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.WhyResponse:
        return pb.WhyResponse(lines=[*self._coordinator.why(), *self._broadcasts.why()])

    async def _set_paused(self, paused: bool) -> None:
        if self._scheduler.paused != paused:
            self._scheduler.set_paused(paused)
            await self._coordinator.begin_commit(all_is_news=True)

    def _state(self) -> pb.RunState.ValueType:
        if self._scheduler.finished:
            return pb.RUN_STATE_FINISHED
        if self._coordinator.stop.is_set():
            return pb.RUN_STATE_STOPPING
        if self._scheduler.version is None:
            return pb.RUN_STATE_STARTING
        return pb.RUN_STATE_PAUSED if self._scheduler.paused else pb.RUN_STATE_RUNNING

    def _actor(self, session: Session) -> pb.ActorStatus:
        now, stats = self._coordinator.clock(), session.stats
        return pb.ActorStatus(
            actor_id=session.info.actor_id,
            session_id=session.session_id,
            engine=session.info.engine,
            address=session.info.address,
            installed=None if session.installed is None else version_to_wire(session.installed),
            num_leases=len(self._scheduler.leases.of_session(session.session_id))
            + len(self._scheduler.evaluations.leases.of_session(session.session_id)),
            since_heartbeat=to_duration(now - session.heard_at),
            stats=stats_to_wire(stats),
            state=self._scheduler.fleet.state(session, now),
            weights=coordinator_pb2.WeightsUse(
                medium=session.weights.medium, num_versions=session.weights.num_versions
            ),
        )

    def _environment(self, name: str, totals: Totals) -> pb.EnvironmentStatus:
        watched = self._scheduler.outages.environments[name]
        faults, breaker = watched.faults, watched.breaker
        return pb.EnvironmentStatus(
            name=name,
            address=self._environments[name],
            num_trajectories=totals.by_environment.get(name, 0),
            infrastructure_faults=faults.counts[FaultKind.INFRASTRUCTURE],
            data_faults=faults.counts[FaultKind.DATA],
            last_fault=faults.last,
            breaker=breaker.state,
            left_out="" if breaker.state is BreakerState.CLOSED else breaker.reason,
            num_groups_cut=watched.num_groups_cut,
        )


def _ledger_to_wire(totals: Totals) -> pb.LedgerStatus:
    states = {state.value: totals.by_state.get(state, 0) for state in TrajectoryState}
    return pb.LedgerStatus(
        accepted=totals.accepted,
        imbalance=totals.imbalance,
        duplicates=totals.duplicates,
        rejected=totals.rejected,
        max_lag_trained=totals.max_lag_trained,
        mixed_version_trained=totals.mixed_version_trained,
        tokens_trained=totals.tokens_trained,
        **states,
    )
