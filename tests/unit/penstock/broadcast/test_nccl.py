"""NCCL, on whatever GPUs there are. Two members on one GPU name themselves different hosts, so that NCCL lets them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from penstock.broadcast.process import MemberProcess
from penstock.broadcast.words import Backend, Event, EventKind, Reason
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.segment import SegmentRing
from tests.broadcast_groups import Group, take
from tests.weight_fixtures import tensor, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MANY_BYTES = 512 * 1024 * 1024


@pytest.fixture
def ring() -> Iterator[SegmentRing]:
    ring = SegmentRing(name_prefix="penstock-test-nccl")
    yield ring
    ring.close()


def make_group(num_receivers: int, **options: object) -> Group:
    return Group(num_receivers, backend=Backend.NCCL, device="cuda", piece_bytes=8 << 20, **options)  # type: ignore[arg-type]


def test_versions_arrive_over_nccl_bit_by_bit(ring: SegmentRing) -> None:
    group = make_group(1)
    contents = [tensors(), [tensor("long", (MANY_BYTES // 4,))], tensors(seed=3)]
    for step, content in enumerate(contents):
        manifest = ring.write(PolicyVersion(1, step), content)
        group.sender.send(manifest)
        sent = group.sender.next(EventKind.SENT, EventKind.FAILED)
        assert sent.kind == EventKind.SENT, sent
        assert not take(group.receivers[0], manifest).missing()
    group.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
def test_a_member_on_a_gpu_that_is_struck_in_the_middle_fails_the_broadcast_in_time(
    ring: SegmentRing, number: signal.Signals
) -> None:
    def on_event(rank: int, process: MemberProcess, event: Event) -> None:
        if event.kind == EventKind.BEGAN and event.step == 1:
            os.kill(process.pid, number)

    group = make_group(1, timeout_seconds=3.0, on_event=on_event)
    group.sender.send(ring.write(PolicyVersion(1, 0), tensors()))
    group.sender.next(EventKind.SENT)
    second = ring.write(PolicyVersion(1, 1), [tensor("long", (MANY_BYTES // 4,), seed=1)])
    started = time.monotonic()
    group.sender.send(second)
    failed = group.sender.next(EventKind.FAILED, EventKind.SENT)
    assert failed.kind == EventKind.FAILED
    assert failed.reason in (Reason.LOST, Reason.TIMEOUT)
    print(
        f"{number.name}: failed after {time.monotonic() - started:.1f} s: {failed.reason}, {failed.message}"
    )
    assert group.sender.next(EventKind.SILENT).ranks == (1,)
    with pytest.raises(WeightTransferError):
        take(group.receivers[0], second)
    group.sender.next(EventKind.ENDED)
    group.close()
