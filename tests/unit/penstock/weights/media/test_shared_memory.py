"""The shared-memory receiver: what the nonce tells before any digest does."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import Manifest, SharedMemoryMedium
from penstock.weights.media.base import Patience
from penstock.weights.media.shared_memory import SharedMemoryReceiver
from penstock.weights.segment import SegmentRing
from tests.weight_fixtures import CHUNK, tensors


@pytest.fixture
def ring() -> Iterator[SegmentRing]:
    ring = SegmentRing(name_prefix="penstock-test-shared", num_segments=2, chunk_bytes=CHUNK)
    yield ring
    ring.close()


def read(receiver: SharedMemoryReceiver, manifest: Manifest) -> Iterator[bytes]:
    patience = Patience(deadline=time.monotonic() + 30, abandoned=threading.Event())
    indices = range(len(manifest.chunk_digests))
    for _, data in receiver.chunks(manifest, manifest.media[0], indices, patience):
        yield data.tobytes()


def test_chunks_are_read_in_place(ring: SegmentRing) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    assert sum(map(len, read(SharedMemoryReceiver(), manifest))) == manifest.num_bytes


def test_a_segment_with_another_nonce_is_not_read(ring: SegmentRing) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    (medium,) = manifest.media
    assert isinstance(medium, SharedMemoryMedium)
    other_host = dataclasses.replace(manifest, media=(dataclasses.replace(medium, nonce="ab" * 16),))
    with pytest.raises(WeightTransferError, match="its nonce is"):
        next(read(SharedMemoryReceiver(), other_host))


def test_an_overwrite_is_noticed_at_the_next_chunk(ring: SegmentRing) -> None:
    receiver = SharedMemoryReceiver()
    reading = read(receiver, ring.write(PolicyVersion(1, 0), tensors()))
    next(reading)
    for step in (1, 2):
        newest = ring.write(PolicyVersion(1, step), tensors())
    with pytest.raises(WeightTransferError, match="its nonce is"):
        next(reading)
    assert sum(map(len, read(receiver, newest))) == newest.num_bytes


def test_an_overwrite_during_the_last_chunk_is_noticed_at_the_end(ring: SegmentRing) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    reading = read(SharedMemoryReceiver(), manifest)
    for _ in manifest.chunk_digests:
        next(reading)
    for step in (1, 2):
        ring.write(PolicyVersion(1, step), tensors())
    with pytest.raises(WeightTransferError, match="its nonce is"):
        next(reading)


def test_a_segment_that_was_mapped_before_is_not_mapped_again(
    ring: SegmentRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = SharedMemoryReceiver()
    for step in range(2):
        list(read(receiver, ring.write(PolicyVersion(1, step), tensors())))
    monkeypatch.setattr("penstock.weights.media.shared_memory.open_segment", lambda *_: 1 / 0)
    for step in range(2, 6):
        list(read(receiver, ring.write(PolicyVersion(1, step), tensors(seed=step))))
    receiver.close()


def test_what_a_trainer_that_is_gone_left_is_unmapped_with_the_next_ones_first_version(
    ring: SegmentRing,
) -> None:
    receiver = SharedMemoryReceiver()
    gone = SegmentRing(name_prefix="penstock-test-gone", num_segments=2, chunk_bytes=CHUNK)
    for step in range(2):
        list(read(receiver, gone.write(PolicyVersion(1, step), tensors())))
    gone.close()
    assert "penstock-test-gone" in Path("/proc/self/maps").read_text()
    list(read(receiver, ring.write(PolicyVersion(2, 0), tensors())))
    assert "penstock-test-gone" not in Path("/proc/self/maps").read_text()
