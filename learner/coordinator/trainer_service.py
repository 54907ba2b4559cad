"""What the trainer's ranks call: protos/penstock/v1/trainer.proto over the scheduler."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc

from learner.coordinator.core import Coordinator, wait_until
from learner.coordinator.decisions import Batch, Waiting
from learner.coordinator.explain import TrainerWait
from learner.coordinator.publications import Publications
from learner.coordinator.refusals import refusals
from penstock.codec import manifest_from_wire, version_from_wire
from penstock.errors import ProtocolError
from penstock.rpc import MAX_MESSAGE_BYTES, to_seconds
from penstock.trajectory import PolicyVersion
from penstock.v1 import trainer_pb2 as pb
from penstock.v1 import trainer_pb2_grpc, trajectory_pb2

MAX_BATCH_WAIT_SECONDS = 30.0
EVALUATION_WAIT_SECONDS = 10.0
"""Of one call that would finish the run, for an evaluation that is open."""
_MESSAGE_BYTES = MAX_MESSAGE_BYTES // 2


class TrainerService(trainer_pb2_grpc.TrainerServiceServicer):
    """Lineages, batches and versions."""

    def __init__(
        self,
        coordinator: Coordinator,
        publications: Publications,
        *,
        keep_checkpoints: int,
        keep_payloads: bool = False,
    ) -> None:
        self._coordinator = coordinator
        self._scheduler = coordinator.scheduler
        self._publications = publications
        self._keep_checkpoints = keep_checkpoints
        self._keep_payloads = keep_payloads

    async def OpenLineage(  # noqa: N802
        self, request: pb.OpenLineageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.OpenLineageResponse:
        async with refusals(context):
            await self._coordinator.commit()
            recorded = self._coordinator.ledger.newest_checkpoint()
            if request.step < recorded:
                self._scheduler.note_event(
                    "fallback",
                    f"the trainer starts from step {request.step}, although a checkpoint of step {recorded} was "
                    "written: it is damaged or gone, as the trainer's log says",
                )
            reopened = self._coordinator.ledger.groups_trained_from(request.step)
            epoch = self._scheduler.lineage.open(request.step, reopened)
            self._scheduler.evaluations.lineage_opened()
            self._publications.withdraw()
            self._coordinator.trainer = None
            await self._coordinator.commit()
            return pb.OpenLineageResponse(run_id=self._coordinator.run_id, epoch=epoch)

    async def NextBatch(  # noqa: N802
        self, request: pb.NextBatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.NextBatchResponse]:
        async with refusals(context):
            answer = await self._await_batch(request)
            stop = self._coordinator.stop.is_set()
            if stop:
                # Raises if the ledger failed: then it is the coordinator alone that ends, and the trainer stays.
                await self._coordinator.commit()
            checkpoint, self._coordinator.checkpoint_requested = self._coordinator.checkpoint_requested, False
            if isinstance(answer, Waiting):
                yield pb.NextBatchResponse(
                    waiting=pb.Waiting(reason=answer.reason),
                    checkpoint_requested=checkpoint,
                    stop_requested=stop,
                )
                return
            for group in answer.groups:
                ids = [member.trajectory_id for member in group.members]
                payloads = self._coordinator.ledger.payloads(group.group_id, ids)
                for piece in _pieces(payloads):
                    yield pb.NextBatchResponse(
                        group=pb.TrainingGroup(
                            group_id=group.group_id,
                            num_groups=len(answer.groups),
                            trajectories=[trajectory_pb2.Trajectory.FromString(p) for p in piece],
                        ),
                        checkpoint_requested=checkpoint,
                        stop_requested=stop,
                    )

    async def _await_batch(self, request: pb.NextBatchRequest) -> Batch | Waiting:
        """The step's batch, with every payload on disk, or why there is none by the deadline."""
        clock = self._coordinator.clock
        deadline = clock() + min(to_seconds(request.wait), MAX_BATCH_WAIT_SECONDS)
        while True:
            change = self._coordinator.changed.next()
            answer = self._scheduler.lineage.next_batch(request.epoch, request.step)
            if isinstance(answer, Batch):
                self._note(None)
                await self._coordinator.commit()
                return answer
            self._note(answer)
            if self._coordinator.stop.is_set() or not await wait_until(change, deadline):
                return answer

    def _note(self, waiting: Waiting | None) -> None:
        """Remembers what the trainer does, and since when, for `why`."""
        before = self._coordinator.trainer
        same = before is not None and (before.waiting is None) == (waiting is None)
        since = before.since if before is not None and same else self._coordinator.clock()
        self._coordinator.trainer = TrainerWait(since=since, waiting=waiting)

    async def PublishVersion(  # noqa: N802
        self, request: pb.PublishVersionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PublishVersionResponse:
        async with refusals(context):
            manifest = manifest_from_wire(request.manifest)
            version = version_from_wire(request.version)
            if manifest.version != version:
                raise ProtocolError(
                    f"version {version} was published with the manifest of {manifest.version}"
                )
            new = self._scheduler.lineage.published(
                version,
                manifest.digest,
                request.manifest.SerializeToString(),
                json.dumps(dict(request.metrics)),
                request.group_ids,
            )
            if new:
                self._scheduler.evaluations.published(version, manifest.digest, self._coordinator.clock())
                self._measure(len(request.group_ids))
                self._coordinator.step_metrics = dict(request.metrics)
                self._note_published()
            # Of a repeated call too: the commit of the one before may have failed, or be under way.
            await self._coordinator.commit()
            if version == self._scheduler.version and self._publications.get(version) is None:
                self._publications.publish(manifest)
                self._coordinator.announce()
            return pb.PublishVersionResponse(deltas_wanted=self._publications.serves_other_hosts)

    def _measure(self, num_groups: int) -> None:
        """How long the step took from its batch on, for the number of actors that could keep up."""
        trainer = self._coordinator.trainer
        if trainer is not None and trainer.waiting is None and num_groups:
            seconds = self._coordinator.clock() - trainer.since
            self._scheduler.demand.step_trained(seconds, num_groups * self._scheduler.schedule.group_size)

    def _note_published(self) -> None:
        waiting = Waiting("the trainer's next request")
        self._coordinator.trainer = TrainerWait(since=self._coordinator.clock(), waiting=waiting)

    async def SkipStep(  # noqa: N802
        self, request: pb.SkipStepRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SkipStepResponse:
        async with refusals(context):
            self._scheduler.lineage.skip(request.epoch, request.step, request.reason)
            await self._coordinator.commit()
            return pb.SkipStepResponse()

    async def RecordCheckpoint(  # noqa: N802
        self, request: pb.RecordCheckpointRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.RecordCheckpointResponse:
        async with refusals(context):
            version = PolicyVersion(request.epoch, request.step)
            self._scheduler.lineage.checkpointed(
                version,
                request.path,
                request.digest,
                keep=self._keep_checkpoints,
                keep_payloads=self._keep_payloads,
            )
            await self._coordinator.commit()
            return pb.RecordCheckpointResponse()

    async def FinishRun(  # noqa: N802
        self, request: pb.FinishRunRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.FinishRunResponse:
        async with refusals(context):
            self._scheduler.lineage.require_epoch(request.epoch)
            waiting = await self._await_evaluation()
            if waiting:
                return pb.FinishRunResponse(waiting=pb.Waiting(reason=waiting))
            self._scheduler.lineage.finish(request.epoch, request.step)
            await self._coordinator.commit()
            await self._coordinator.refresh_totals()
            return pb.FinishRunResponse()

    async def _await_evaluation(self) -> str:
        """Why the run cannot be finished yet; empty if it can."""
        clock = self._coordinator.clock
        deadline = clock() + EVALUATION_WAIT_SECONDS
        while True:
            change = self._coordinator.changed.next()
            evaluation = self._scheduler.evaluations.open
            if evaluation is None or self._scheduler.finished:
                return ""
            reason = f"the evaluation of version {evaluation.version}"
            self._note(Waiting(reason))
            if self._coordinator.stop.is_set() or not await wait_until(change, deadline):
                return f"{reason}: {evaluation.num_answers} of {evaluation.num_slots} answers"


def _pieces(payloads: Sequence[bytes]) -> Iterator[list[bytes]]:
    """A group's trajectories in messages that gRPC lets through; at least one in each."""
    piece: list[bytes] = []
    num_bytes = 0
    for payload in payloads:
        if piece and num_bytes + len(payload) > _MESSAGE_BYTES:
            yield piece
            piece, num_bytes = [], 0
        piece.append(payload)
        num_bytes += len(payload)
    yield piece
