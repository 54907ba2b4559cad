"""TrainerService over real gRPC, for tests: batches by step, and a record of what it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from learner.training.batch import Batch
from penstock.codec import trajectory_to_wire
from penstock.v1 import trainer_pb2, trainer_pb2_grpc
from tests.trainer_fakes import make_batch


class TrainerServer(trainer_pb2_grpc.TrainerServiceServicer):
    """Listens on a free port of 127.0.0.1; use it as a context manager."""

    def __init__(self, *, num_batches: int = 10**9, make: Callable[[int], Batch] = make_batch) -> None:
        self.calls: list[str] = []
        self.metrics: dict[int, dict[str, float]] = {}
        self.trained: dict[int, tuple[int, ...]] = {}
        self.on_batch: Callable[[int], None] = lambda step: None
        """Called before each batch is handed out."""
        self.published: dict[int, threading.Event] = {}
        self._num_batches = num_batches
        self._make = make
        self._server = grpc.server(ThreadPoolExecutor(8))
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> TrainerServer:
        self._server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop(0).wait()

    def wait_published(self, step: int) -> None:
        """Waits until version `step` is published; fails after a minute."""
        assert self.published.setdefault(step, threading.Event()).wait(60), self.calls

    def OpenLineage(self, request: Any, context: Any) -> Any:
        self.calls.append(f"open {request.step}")
        return trainer_pb2.OpenLineageResponse(run_id="trainer-test", epoch=1)

    def NextBatch(self, request: Any, context: Any) -> Iterator[Any]:
        if request.step >= self._num_batches:
            threading.Event().wait(min(0.2, request.wait.ToNanoseconds() / 1e9))
            yield trainer_pb2.NextBatchResponse(waiting=trainer_pb2.Waiting(reason="no actors"))
            return
        self.on_batch(request.step)
        groups = self._make(request.step).groups
        for group in groups:
            yield trainer_pb2.NextBatchResponse(
                group=trainer_pb2.TrainingGroup(
                    group_id=group.group_id,
                    num_groups=len(groups),
                    trajectories=[trajectory_to_wire(trajectory) for trajectory in group.trajectories],
                )
            )

    def PublishVersion(self, request: Any, context: Any) -> Any:
        self.calls.append(f"publish {request.version.epoch}.{request.version.step}")
        self.metrics[request.version.step] = dict(request.metrics)
        self.trained[request.version.step] = tuple(request.group_ids)
        self.published.setdefault(request.version.step, threading.Event()).set()
        return trainer_pb2.PublishVersionResponse()

    def SkipStep(self, request: Any, context: Any) -> Any:
        self.calls.append(f"skip {request.step}")
        return trainer_pb2.SkipStepResponse()

    def RecordCheckpoint(self, request: Any, context: Any) -> Any:
        self.calls.append(f"checkpoint {request.step}")
        return trainer_pb2.RecordCheckpointResponse()

    def FinishRun(self, request: Any, context: Any) -> Any:
        self.calls.append(f"finish {request.step}")
        return trainer_pb2.FinishRunResponse()
