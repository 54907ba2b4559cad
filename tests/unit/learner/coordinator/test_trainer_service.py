"""Batches too large for one message, versions that are told of twice, and stops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc
import pytest

from learner.coordinator.core import Coordinator
from learner.coordinator.ledger import Ledger, _Write
from learner.coordinator.publications import Publications
from learner.coordinator.trainer_service import _MESSAGE_BYTES, TrainerService, _pieces
from learner.training.coordinator import _decode_next_batch
from penstock.codec import manifest_to_wire, version_to_wire
from penstock.errors import LedgerError
from penstock.rpc import to_duration
from penstock.signals import Stop
from penstock.trajectory import Lease, PolicyVersion, Sampling, Task
from penstock.v1 import trainer_pb2 as pb
from penstock.weights.media.zeromq import ZeromqServer
from penstock.weights.segment import SegmentRing
from tests.weight_fixtures import tensor

from .fakes import make_message, make_scheduler

VERSION = PolicyVersion(1, 0)


def lease(group_id: int, slot: int) -> Lease:
    return Lease(
        lease_id=f"{group_id}.{slot}.0",
        group_id=group_id,
        slot=slot,
        attempt=0,
        task=Task("words", "train", group_id, 1),
        sampling=Sampling(),
        progress_timeout_seconds=60.0,
    )


def test_a_small_group_is_one_message():
    assert list(_pieces([b"a", b"b"])) == [[b"a", b"b"]]


def test_a_large_group_is_cut_between_trajectories():
    half = bytes(_MESSAGE_BYTES // 2)
    assert [len(piece) for piece in _pieces([half, half, half, half, half])] == [2, 2, 1]
    assert [len(piece) for piece in _pieces([bytes(_MESSAGE_BYTES + 1), b"a"])] == [1, 1]


def test_a_group_in_pieces_is_one_group_again():
    answers = [
        pb.NextBatchResponse(
            group=pb.TrainingGroup(
                group_id=group_id, num_groups=2, trajectories=[make_message(lease(group_id, slot), VERSION)]
            )
        )
        for group_id in (4, 7)
        for slot in range(3)
    ]
    batch = _decode_next_batch(0, answers).batch
    assert batch is not None
    assert [group.group_id for group in batch.groups] == [4, 7]
    assert [t.lease_id for t in batch.groups[1].trajectories] == ["7.0.0", "7.1.0", "7.2.0"]


class Refused(Exception):
    """A call was aborted."""


class Context:
    def peer(self) -> str:
        return "the trainer"

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise Refused(f"{code.name}: {details}")


@dataclass
class Service:
    trainer: TrainerService
    ledger: Ledger
    stop: Stop
    publications: Publications
    request: pb.PublishVersionRequest

    async def publish(self) -> None:
        await self.trainer.PublishVersion(self.request, Context())  # type: ignore[arg-type]

    async def next_batch(self, *, wait_seconds: float = 10.0) -> list[pb.NextBatchResponse]:
        request = pb.NextBatchRequest(epoch=1, step=0, wait=to_duration(wait_seconds))
        return [answer async for answer in self.trainer.NextBatch(request, Context())]  # type: ignore[arg-type]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """That a trainer is about to tell of its lineage's first version."""
    with contextlib.ExitStack() as stack:
        ring = stack.enter_context(
            contextlib.closing(SegmentRing(name_prefix="penstock-test-trainer-service"))
        )
        server = stack.enter_context(contextlib.closing(ZeromqServer("tcp://127.0.0.1:0")))
        ledger = stack.enter_context(contextlib.closing(Ledger(tmp_path / "ledger.sqlite")))
        scheduler = make_scheduler(history=ledger)
        scheduler.lineage.open(0, [])
        stop = Stop()
        coordinator = Coordinator(scheduler, ledger, stop, run_id="r")
        publications = Publications(server)
        manifest = ring.write(VERSION, [tensor("w", (4,))])
        request = pb.PublishVersionRequest(
            version=version_to_wire(VERSION), manifest=manifest_to_wire(manifest)
        )
        trainer = TrainerService(coordinator, publications, keep_checkpoints=1)
        yield Service(trainer, ledger, stop, publications, request)


async def test_a_version_that_is_told_of_twice_is_published_once(service: Service):
    await service.publish()
    first = service.publications.newest
    await service.publish()
    assert first is not None
    assert service.publications.newest is first


async def test_a_version_whose_commit_failed_is_not_confirmed_when_it_is_told_of_again(service: Service):
    service.ledger._failed = LedgerError("the disk is gone")
    for _ in range(2):
        with pytest.raises(Refused, match="UNAVAILABLE: the disk is gone"):
            await service.publish()
    assert service.publications.newest is None


async def test_a_stop_is_told_to_the_trainer(service: Service):
    await service.publish()
    service.stop.set("enough")
    (answer,) = await service.next_batch()
    assert answer.stop_requested


async def test_a_coordinator_that_ends_since_its_ledger_failed_does_not_stop_the_trainer(service: Service):
    await service.publish()
    service.ledger._failed = LedgerError("the disk is gone")
    service.stop.set("the disk is gone")
    with pytest.raises(Refused, match="UNAVAILABLE: the disk is gone"):
        await service.next_batch()


async def test_a_ledger_that_fails_while_the_trainer_waits_does_not_stop_it(service: Service):
    await service.publish()
    asked = asyncio.create_task(service.next_batch(wait_seconds=0.5))
    await asyncio.sleep(0.1)
    assert not asked.done()
    service.ledger._failed = LedgerError("the disk is gone")
    service.stop.set("the disk is gone")
    with pytest.raises(Refused, match="UNAVAILABLE: the disk is gone"):
        await asked


async def test_a_version_that_is_told_of_again_waits_for_the_first_one_s_commit(
    service: Service, monkeypatch: pytest.MonkeyPatch
):
    may_commit, commit = threading.Event(), service.ledger._commit

    def commit_later(batch: list[_Write]) -> LedgerError | None:
        assert may_commit.wait(timeout=10.0)
        return commit(batch)

    monkeypatch.setattr(service.ledger, "_commit", commit_later)
    calls = [asyncio.create_task(service.publish()) for _ in range(2)]
    done, _ = await asyncio.wait(calls, timeout=0.2)
    assert not done
    may_commit.set()
    await asyncio.gather(*calls)
    assert service.publications.newest is not None
