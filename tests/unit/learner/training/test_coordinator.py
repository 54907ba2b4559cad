from typing import Any

import grpc
import pytest

from learner.training.coordinator import GrpcCoordinator
from penstock.errors import PeerLost, ProtocolError, SessionFenced
from penstock.trajectory import PolicyVersion
from penstock.v1 import trajectory_pb2
from penstock.weights.manifest import Manifest
from tests.trainer_fakes import make_batch
from tests.trainer_server import TrainerServer

MANIFEST = Manifest(
    version=PolicyVersion(1, 1), tensors=(), num_bytes=0, chunk_bytes=1, chunk_digests=(), digest="00"
)


def test_a_batch_arrives_as_it_was_made() -> None:
    with TrainerServer() as server:
        coordinator = GrpcCoordinator(server.address)
        assert coordinator.open_lineage(0).epoch == 1
        answer = coordinator.next_batch(epoch=1, step=3, wait_seconds=1.0)
    assert answer.batch is not None
    assert answer.batch.fingerprint() == make_batch(3).fingerprint()
    for got, expected in zip(answer.batch.trajectories(), make_batch(3).trajectories(), strict=True):
        assert got.logprobs.tolist() == expected.logprobs.tolist()
        assert got.reward == expected.reward


def test_without_a_batch_there_is_a_reason() -> None:
    with TrainerServer(num_batches=0) as server:
        answer = GrpcCoordinator(server.address).next_batch(epoch=1, step=0, wait_seconds=0.01)
    assert answer.batch is None
    assert answer.waiting == "no actors"


def test_what_rank_0_tells_arrives() -> None:
    with TrainerServer() as server:
        coordinator = GrpcCoordinator(server.address)
        coordinator.publish_version(PolicyVersion(1, 1), MANIFEST, {"loss": 0.5}, (3, 4))
        coordinator.skip_step(epoch=1, step=1, reason="not finite")
        coordinator.record_checkpoint(epoch=1, step=1, path="p", digest="d")
        coordinator.finish_run(epoch=1, step=2)
    assert server.calls == ["publish 1.1", "skip 1", "checkpoint 1", "finish 2"]
    assert server.metrics[1] == {"loss": 0.5}
    assert server.trained[1] == (3, 4)


class Refusing(TrainerServer):
    """Fails FinishRun with one status after the other, then succeeds."""

    def __init__(self, *codes: grpc.StatusCode) -> None:
        super().__init__()
        self._codes = list(codes)

    def FinishRun(self, request: Any, context: Any) -> Any:
        if self._codes:
            context.abort(self._codes.pop(0), "for a reason")
        return super().FinishRun(request, context)


def test_a_fault_that_passes_is_tried_again() -> None:
    with Refusing(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE) as server:
        GrpcCoordinator(server.address).finish_run(epoch=1, step=2)
    assert server.calls == ["finish 2"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.ABORTED, SessionFenced),
        (grpc.StatusCode.FAILED_PRECONDITION, SessionFenced),
        (grpc.StatusCode.INVALID_ARGUMENT, ProtocolError),
    ],
)
def test_a_refusal_is_final(code: grpc.StatusCode, error: type[Exception]) -> None:
    with Refusing(code) as server, pytest.raises(error, match=r"FinishRun.*for a reason"):
        GrpcCoordinator(server.address).finish_run(epoch=1, step=2)


def test_a_coordinator_that_stays_away_is_lost() -> None:
    with TrainerServer() as server:
        address = server.address
    with pytest.raises(PeerLost, match="did not answer FinishRun"):
        GrpcCoordinator(address, retry_seconds=0.3).finish_run(epoch=1, step=2)


class Cutting(TrainerServer):
    """Leaves out a batch's last group."""

    def NextBatch(self, request: Any, context: Any) -> Any:
        yield from list(super().NextBatch(request, context))[:-1]


class Unscored(TrainerServer):
    """Hands out a trajectory whose reward is no value."""

    def NextBatch(self, request: Any, context: Any) -> Any:
        for answer in super().NextBatch(request, context):
            for trajectory in answer.group.trajectories:
                trajectory.reward.Clear()
                trajectory.reward.status = trajectory_pb2.REWARD_STATUS_NOT_YET
            yield answer


@pytest.mark.parametrize(
    ("server", "message"),
    [(Cutting, "gave 2 groups of step 0; it announced 3"), (Unscored, "has reward status not_yet")],
)
def test_a_batch_that_is_not_whole_is_refused(server: type[TrainerServer], message: str) -> None:
    with server() as running, pytest.raises(ProtocolError, match=message):
        GrpcCoordinator(running.address).next_batch(epoch=1, step=0, wait_seconds=1.0)
