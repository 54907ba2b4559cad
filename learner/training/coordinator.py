"""The trainer's side of protos/penstock/v1/trainer.proto: blocking calls, each with a deadline.

A coordinator that is away for a moment (restarting, stalled) is retried; one that stays
away is PeerLost; one that says that a newer trainer took over is SessionFenced.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import grpc

from learner.training.batch import Batch, Group
from penstock.codec import manifest_to_wire, trajectory_from_wire, version_to_wire
from penstock.errors import PeerLost, ProtocolError, SessionFenced
from penstock.rpc import CHANNEL_OPTIONS, to_duration
from penstock.trajectory import PolicyVersion
from penstock.v1 import trainer_pb2, trainer_pb2_grpc
from penstock.weights.manifest import Manifest

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

CALL_SECONDS = 30.0
"""Deadline of a call, beyond what it may wait by contract."""
RETRY_SECONDS = 60.0
"""For how long an unreachable coordinator is tried again."""
_BACKOFF_SECONDS = (0.1, 2.0)
_TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,  # by the coordinator, which ends
)
_FENCED = (grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    run_id: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NextBatch:
    """What the coordinator says to the question for a batch."""

    batch: Batch | None
    waiting: str = ""
    """Why there is none yet."""
    checkpoint_requested: bool = False
    stop_requested: bool = False


class Coordinator(Protocol):
    """What the training loop asks and tells. All of it is idempotent."""

    def open_lineage(self, step: int) -> Lineage:
        """Training goes on from checkpoint `step`; what was consumed after it is pending again."""
        ...

    def next_batch(self, *, epoch: int, step: int, wait_seconds: float) -> NextBatch: ...

    def publish_version(
        self, version: PolicyVersion, manifest: Manifest, metrics: Mapping[str, float], trained: Sequence[int]
    ) -> bool:
        """trained: the groups of the step that made the version; none for a lineage's first.

        Returns whether actors on other hosts want the next version as a delta too.
        """
        ...

    def skip_step(self, *, epoch: int, step: int, reason: str) -> None: ...

    def record_checkpoint(self, *, epoch: int, step: int, path: str, digest: str) -> None: ...

    def finish_run(self, *, epoch: int, step: int) -> None:
        """Returns once no evaluation is open any more: until then actors may fetch the last version."""
        ...


class GrpcCoordinator:
    """Coordinator over gRPC. Raises PeerLost, SessionFenced, ProtocolError."""

    def __init__(
        self,
        address: str,
        *,
        call_seconds: float = CALL_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = trainer_pb2_grpc.TrainerServiceStub(self._channel)
        self._call_seconds = call_seconds
        self._retry_seconds = retry_seconds
        self._stopping = stopping

    def close(self) -> None:
        self._channel.close()

    def open_lineage(self, step: int) -> Lineage:
        request = trainer_pb2.OpenLineageRequest(step=step)
        answer = self._call(
            "OpenLineage", lambda: self._stub.OpenLineage(request, timeout=self._call_seconds)
        )
        return Lineage(run_id=answer.run_id, epoch=answer.epoch)

    def next_batch(self, *, epoch: int, step: int, wait_seconds: float) -> NextBatch:
        request = trainer_pb2.NextBatchRequest(epoch=epoch, step=step, wait=to_duration(wait_seconds))
        timeout = wait_seconds + self._call_seconds
        answers = self._call("NextBatch", lambda: list(self._stub.NextBatch(request, timeout=timeout)))
        return _decode_next_batch(step, answers)

    def publish_version(
        self, version: PolicyVersion, manifest: Manifest, metrics: Mapping[str, float], trained: Sequence[int]
    ) -> bool:
        request = trainer_pb2.PublishVersionRequest(
            version=version_to_wire(version),
            manifest=manifest_to_wire(manifest),
            metrics=dict(metrics),
            group_ids=trained,
        )
        answer = self._call(
            "PublishVersion", lambda: self._stub.PublishVersion(request, timeout=self._call_seconds)
        )
        return answer.deltas_wanted

    def skip_step(self, *, epoch: int, step: int, reason: str) -> None:
        request = trainer_pb2.SkipStepRequest(epoch=epoch, step=step, reason=reason)
        self._call("SkipStep", lambda: self._stub.SkipStep(request, timeout=self._call_seconds))

    def record_checkpoint(self, *, epoch: int, step: int, path: str, digest: str) -> None:
        request = trainer_pb2.RecordCheckpointRequest(epoch=epoch, step=step, path=path, digest=digest)
        self._call(
            "RecordCheckpoint", lambda: self._stub.RecordCheckpoint(request, timeout=self._call_seconds)
        )

    def finish_run(self, *, epoch: int, step: int) -> None:
        """Stays while an evaluation is open, which the coordinator bounds, or until a stop."""
        request = trainer_pb2.FinishRunRequest(epoch=epoch, step=step)
        while True:
            answer = self._call(
                "FinishRun", lambda: self._stub.FinishRun(request, timeout=self._call_seconds)
            )
            if not answer.HasField("waiting") or self._stopping():
                return
            _log.info("the last step is trained; waiting for %s", answer.waiting.reason)

    def _call(self, name: str, call: Callable[[], _Result]) -> _Result:
        """Makes one call, again while it fails for reasons that pass, within `retry_seconds`."""
        give_up = time.monotonic() + self._retry_seconds
        backoff, most = _BACKOFF_SECONDS
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                fault = _fault(name, self._address, error)
                if not isinstance(fault, PeerLost):
                    raise fault from error
                if time.monotonic() + backoff > give_up or self._stopping():
                    raise fault from error
                _log.warning("%s; trying again in %.1f s", fault, backoff)
            time.sleep(backoff)
            backoff = min(2 * backoff, most)


def _fault(name: str, address: str, error: grpc.RpcError) -> PeerLost | SessionFenced | ProtocolError:
    assert isinstance(error, grpc.Call)
    code, details = error.code(), error.details()
    if code in _TRANSIENT:
        return PeerLost(f"the coordinator at {address} did not answer {name}: {code.name}: {details}")
    if code in _FENCED:
        return SessionFenced(f"the coordinator refused {name}: {details}")
    return ProtocolError(f"the coordinator refused {name}: {code.name}: {details}")


def _decode_next_batch(step: int, answers: list[trainer_pb2.NextBatchResponse]) -> NextBatch:
    if not answers:
        raise ProtocolError("NextBatch ended without an answer; expected groups, or a reason to wait")
    checkpoint = any(answer.checkpoint_requested for answer in answers)
    stop = any(answer.stop_requested for answer in answers)
    pieces = (answer.group for answer in answers if answer.HasField("group"))
    by_group = itertools.groupby(pieces, key=lambda piece: piece.group_id)
    groups = tuple(_decode_group(group_id, parts) for group_id, parts in by_group)
    if not groups:
        reason = answers[0].waiting.reason
        return NextBatch(batch=None, waiting=reason, checkpoint_requested=checkpoint, stop_requested=stop)
    expected = answers[0].group.num_groups
    if len(groups) != expected:
        raise ProtocolError(f"NextBatch gave {len(groups)} groups of step {step}; it announced {expected}")
    batch = Batch(step=step, groups=groups)
    return NextBatch(batch=batch, checkpoint_requested=checkpoint, stop_requested=stop)


def _decode_group(group_id: int, pieces: Iterable[trainer_pb2.TrainingGroup]) -> Group:
    trajectories = tuple(
        trajectory_from_wire(trajectory) for piece in pieces for trajectory in piece.trajectories
    )
    if not trajectories:
        raise ProtocolError(f"group {group_id} has no trajectories; expected at least one")
    for trajectory in trajectories:
        if trajectory.reward.value is None:
            raise ProtocolError(
                f"trajectory {trajectory.trajectory_id} has reward status {trajectory.reward.status}; "
                "only valid rewards are trained on"
            )
    return Group(group_id=group_id, trajectories=trajectories)
