"""The receiving end of broadcasts: what it takes from its member's process, and when it gives up. With fakes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from penstock.broadcast.words import Event, EventKind, Formation, Sending, Settings
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import CollectiveMedium, Manifest
from penstock.weights.media.base import Patience
from penstock.weights.media.collective import CollectiveReceiver, Invitation
from penstock.weights.segment import OwnedSegment, create_segment
from penstock.weights.staged import StagedWeights, stage
from tests.weight_fixtures import tensor

FIRST, SECOND = CollectiveMedium(group="first"), CollectiveMedium(group="second")
NONCE = b"n" * 16


class FakeMember:
    def __init__(self, settings: Settings, on_event: Callable[[Event], None]) -> None:
        self.settings = settings
        self.says = on_event
        self.is_killed = False

    def tell(self, command: Formation | Sending) -> None:
        raise AssertionError("a receiver is told nothing")

    def kill(self) -> None:
        self.is_killed = True

    def begins(self, manifest: Manifest, owned: OwnedSegment) -> None:
        self.says(
            Event(
                kind=EventKind.BEGAN,
                epoch=manifest.version.epoch,
                step=manifest.version.step,
                digest=manifest.digest,
                segment=owned.segment.name,
                nonce=NONCE.hex(),
            )
        )


class End:
    """A receiver, and the members that it started."""

    def __init__(self, *media: CollectiveMedium, timeout_seconds: float = 20.0) -> None:
        self.members: list[FakeMember] = []
        self.receiver = CollectiveReceiver(host="10.0.0.1", device="cuda:1", start=self._start)
        self._timeout_seconds = timeout_seconds
        for medium in media:
            self.invite(medium)

    def invite(self, medium: CollectiveMedium, backend: str = "nccl") -> None:
        self.receiver.invite(
            Invitation(
                group=medium.group,
                port=7,
                rank=2,
                size=3,
                backend=backend,
                piece_bytes=1024,
                timeout_seconds=self._timeout_seconds,
                forming_seconds=9.0,
            )
        )

    def take(self, version: StagedWeights, medium: CollectiveMedium = FIRST) -> Iterator[tuple[int, bytes]]:
        patience = Patience(deadline=time.monotonic() + 20.0, abandoned=threading.Event())
        indices = range(len(version.manifest.chunk_digests))
        for index, data in self.receiver.chunks(version.manifest, medium, indices, patience):
            yield index, data.tobytes()

    def _start(self, settings: Settings, on_event: Callable[[Event], None]) -> FakeMember:
        self.members.append(FakeMember(settings, on_event))
        return self.members[-1]


def version(step: int) -> StagedWeights:
    """Three chunks of 1 MiB."""
    return stage(PolicyVersion(1, step), [tensor("a", (700_000,), seed=step)])


@pytest.fixture
def segment() -> Iterator[OwnedSegment]:
    owned = create_segment("penstock-test-collective", version(0).manifest.num_bytes)
    owned.segment.set_nonce(NONCE)
    yield owned
    owned.remove()


def fill(owned: OwnedSegment, staged: StagedWeights, num_bytes: int) -> None:
    owned.segment.payload[:num_bytes] = staged.buffer[:num_bytes]
    owned.segment.set_num_arrived(num_bytes)


def test_chunks_are_taken_as_they_arrive(segment: OwnedSegment) -> None:
    end, wanted = End(FIRST), version(0)
    size = wanted.manifest.num_bytes
    end.members[0].begins(wanted.manifest, segment)
    fill(segment, wanted, 1 << 20)
    chunks = end.take(wanted)
    assert next(chunks) == (0, wanted.buffer[: 1 << 20].tobytes())
    fill(segment, wanted, size)
    assert b"".join(data for _, data in chunks) == wanted.buffer[1 << 20 :].tobytes()


def test_a_member_has_what_its_learner_told_and_its_engine_s_device_for_nccl_alone() -> None:
    end = End(FIRST)
    end.invite(FIRST)
    assert len(end.members) == 1, "an invitation may come twice"
    settings = end.members[0].settings
    assert (settings.host, settings.port, settings.rank, settings.size) == ("10.0.0.1", 7, 2, 3)
    assert (settings.device, settings.timeout_seconds, settings.forming_seconds) == ("cuda:1", 20.0, 9.0)
    end.invite(SECOND, backend="gloo")
    assert end.members[1].settings.device == "cpu"


def test_a_group_that_fails_ends_the_wait_with_its_reason(segment: OwnedSegment) -> None:
    end, wanted = End(FIRST), version(0)
    assert end.receiver.has(FIRST)
    end.members[0].begins(wanted.manifest, segment)
    fill(segment, wanted, 1 << 20)
    chunks = end.take(wanted)
    next(chunks)
    end.members[0].says(Event(kind=EventKind.FAILED, message="a member fell silent"))
    end.members[0].says(Event(kind=EventKind.ENDED, message="its process ended"))
    with pytest.raises(WeightTransferError, match="a member fell silent"):
        next(chunks)
    assert not end.receiver.has(FIRST), "from now on it is passed over"


def test_a_version_that_a_newer_broadcast_overwrites_is_given_up(segment: OwnedSegment) -> None:
    end, wanted = End(FIRST), version(0)
    end.members[0].begins(wanted.manifest, segment)
    fill(segment, wanted, wanted.manifest.num_bytes)
    chunks = end.take(wanted)
    next(chunks)
    segment.segment.set_nonce(b"m" * 16)
    with pytest.raises(WeightTransferError, match="overwritten"):
        next(chunks)


def test_a_version_whose_turn_has_passed_is_given_up_at_once(segment: OwnedSegment) -> None:
    end = End(FIRST)
    end.members[0].begins(version(2).manifest, segment)
    with pytest.raises(WeightTransferError, match=r"1\.1 is not broadcast.*1\.2 is"):
        next(end.take(version(1)))


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_broadcast_that_does_not_move_is_given_up(segment: OwnedSegment, has_begun: bool) -> None:
    end, wanted = End(FIRST, timeout_seconds=0.1), version(0)
    if has_begun:
        end.members[0].begins(wanted.manifest, segment)
    with pytest.raises(WeightTransferError, match=r"nothing arrived for 0\.1 s"):
        next(end.take(wanted))


def test_who_is_no_member_is_told_so() -> None:
    with pytest.raises(WeightTransferError, match="no member of second"):
        next(End(FIRST).take(version(0), SECOND))


def test_a_group_is_left_when_a_version_comes_from_the_next(segment: OwnedSegment) -> None:
    end, wanted = End(FIRST, SECOND), version(0)
    assert not end.members[0].is_killed, "versions come from the first until the second stands"
    end.members[1].begins(wanted.manifest, segment)
    fill(segment, wanted, wanted.manifest.num_bytes)
    assert np.array_equal(
        np.frombuffer(b"".join(data for _, data in end.take(wanted, SECOND)), np.uint8), wanted.buffer
    )
    assert [member.is_killed for member in end.members] == [True, False]
    end.receiver.close()
    assert end.members[1].is_killed


def test_groups_that_failed_make_room_before_others() -> None:
    end = End(FIRST, SECOND, CollectiveMedium(group="third"))
    end.members[1].says(Event(kind=EventKind.FAILED, message="not all came"))
    end.invite(CollectiveMedium(group="fourth"))
    assert [member.is_killed for member in end.members] == [False, True, False, False]
    end.invite(CollectiveMedium(group="fifth"))
    assert [member.is_killed for member in end.members] == [True, True, False, False, False]
