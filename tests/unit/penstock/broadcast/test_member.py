"""Members' processes: what is sent arrives, and whoever is stuck or gone holds nobody up."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from penstock.broadcast.process import MemberProcess
from penstock.broadcast.words import Event, EventKind, Reason
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import Manifest, SharedMemoryMedium
from penstock.weights.segment import SegmentRing
from tests.broadcast_groups import SECONDS, Group, take
from tests.weight_fixtures import flip_byte, tensor, tensors

MANY_BYTES = 96 * 1024 * 1024
"""Enough for something to happen meanwhile."""


@pytest.fixture
def ring() -> Iterator[SegmentRing]:
    ring = SegmentRing(name_prefix="penstock-test-broadcast")
    yield ring
    ring.close()


def big_version(ring: SegmentRing, step: int) -> Manifest:
    return ring.write(PolicyVersion(1, step), [tensor("long", (MANY_BYTES // 4,), seed=step)])


def test_every_version_arrives_at_every_member(ring: SegmentRing) -> None:
    group = Group(2)
    for step in range(3):
        manifest = ring.write(PolicyVersion(1, step), tensors(seed=step))
        group.sender.send(manifest)
        assert group.sender.next(EventKind.SENT).digest == manifest.digest
        for receiver in group.receivers:
            assert not take(receiver, manifest).missing()
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in (group.sender.process, *(member.started[0] for member in group.members))
        for connection in psutil.Process(process.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}
    group.close()


def strike(number: signal.Signals) -> Callable[[int, MemberProcess, Event], None]:
    """Has the first member struck as soon as the second version begins to arrive."""

    def on_event(rank: int, process: MemberProcess, event: Event) -> None:
        if rank == 1 and event.kind == EventKind.BEGAN and event.step == 1:
            os.kill(process.pid, number)

    return on_event


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
def test_a_member_that_is_struck_in_the_middle_fails_the_broadcast_in_time_and_is_named(
    ring: SegmentRing, number: signal.Signals
) -> None:
    group = Group(2, timeout_seconds=2.0, on_event=strike(number))
    first = ring.write(PolicyVersion(1, 0), tensors())
    group.sender.send(first)
    group.sender.next(EventKind.SENT)
    second = big_version(ring, 1)
    with ThreadPoolExecutor() as threads:
        taking = [threads.submit(take, receiver, second) for receiver in group.receivers]
        group.sender.send(second)
        failed = group.sender.next(EventKind.FAILED)
        assert failed.reason == (Reason.LOST if number == signal.SIGKILL else Reason.TIMEOUT)
        assert group.sender.next(EventKind.SILENT).ranks == (1,)
        with pytest.raises(WeightTransferError):
            taking[0].result(timeout=SECONDS)
        with pytest.raises(WeightTransferError, match=r"failed|nothing arrived"):
            taking[1].result(timeout=SECONDS)
    group.sender.next(EventKind.ENDED)
    group.close()


def test_a_sender_that_is_killed_in_the_middle_ends_the_wait(ring: SegmentRing) -> None:
    def on_event(rank: int, process: MemberProcess, event: Event) -> None:
        if event.kind == EventKind.BEGAN:
            group.sender.process.kill()

    group = Group(1, timeout_seconds=2.0, on_event=on_event)
    manifest = big_version(ring, 0)
    group.sender.send(manifest)
    with pytest.raises(WeightTransferError, match=r"failed|nothing arrived"):
        take(group.receivers[0], manifest)
    group.close()


def test_a_member_that_falls_silent_between_two_broadcasts_is_noticed(ring: SegmentRing) -> None:
    group = Group(2)
    os.kill(group.members[1].started[0].pid, signal.SIGSTOP)
    assert group.sender.next(EventKind.FAILED).reason == Reason.LOST
    assert group.sender.next(EventKind.SILENT).ranks == (2,)
    group.close()


def test_a_version_that_is_overwritten_as_it_is_sent_arrives_with_other_digests() -> None:
    """And the group stands."""
    ring = SegmentRing(name_prefix="penstock-test-broadcast", num_segments=2)
    manifest = big_version(ring, 0)
    (medium,) = manifest.media
    assert isinstance(medium, SharedMemoryMedium)

    def on_event(rank: int, process: MemberProcess, event: Event) -> None:
        if event.kind == EventKind.BEGAN and event.step == 0:
            flip_byte(medium.name, MANY_BYTES - 1)
            for step in (1, 2):
                ring.write(PolicyVersion(1, step), tensors(seed=step))

    group = Group(1, on_event=on_event)
    group.sender.send(manifest)
    buffer = take(group.receivers[0], manifest)
    assert not group.sender.next(EventKind.SENT).is_whole
    assert buffer.missing()[-1] == len(manifest.chunk_digests) - 1
    newest = ring.write(PolicyVersion(1, 9), tensors())
    group.sender.send(newest)
    assert not take(group.receivers[0], newest).missing()
    group.close()
    ring.close()


def test_a_group_of_which_one_does_not_come_is_given_up(ring: SegmentRing) -> None:
    group = Group(0, forming_seconds=2.0, size=2)
    assert group.sender.next(EventKind.FAILED).reason == Reason.FORMING
    assert group.sender.next(EventKind.SILENT).ranks == (1,)
    group.close()
