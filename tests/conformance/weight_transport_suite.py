"""What every medium must do. A test module subclasses WeightTransportSuite."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import HostTensor, Manifest, SharedMemoryMedium
from penstock.weights.media.base import WeightReceiver
from penstock.weights.segment import SegmentRing
from tests.weight_fixtures import CHUNK, ObservedReceiver, assert_holds, flip_byte, tensor, tensors

SECONDS = 30.0


class WeightTransportSuite:
    """Subclasses define `offer` and `make_receiver`."""

    segment: str
    """Where the version that was published last lies."""
    epoch: int
    """Another one in each test: where tests share a server, no version comes after a newer one."""
    _epochs = itertools.count(1)

    def offer(self, manifest: Manifest) -> Manifest:
        """Makes a version of this host's ring available over the medium, and over no other."""
        raise NotImplementedError

    def make_receiver(self) -> WeightReceiver:
        raise NotImplementedError

    @pytest.fixture
    def ring(self) -> Iterator[SegmentRing]:
        self.epoch = next(self._epochs)
        ring = SegmentRing(name_prefix="penstock-test", num_segments=3, chunk_bytes=CHUNK)
        yield ring
        ring.close()

    @pytest.fixture
    def receiver(self) -> ObservedReceiver:
        return ObservedReceiver(self.make_receiver())

    @pytest.fixture
    def fetcher(self, receiver: ObservedReceiver) -> Iterator[WeightFetcher]:
        fetcher = WeightFetcher([receiver])
        yield fetcher
        fetcher.close()

    def publish(self, ring: SegmentRing, step: int, content: list[HostTensor]) -> Manifest:
        written = ring.write(PolicyVersion(self.epoch, step), content)
        self.segment = next(each.name for each in written.media if isinstance(each, SharedMemoryMedium))
        return self.offer(written)

    def test_a_version_arrives_bit_by_bit(self, ring: SegmentRing, fetcher: WeightFetcher) -> None:
        staged = fetcher.fetch(self.publish(ring, 0, tensors()), timeout_seconds=SECONDS)
        assert_holds(staged, tensors())

    def test_one_byte_more_or_less_than_a_chunk_arrives(
        self, ring: SegmentRing, fetcher: WeightFetcher
    ) -> None:
        for step, num_elements in enumerate((1, CHUNK // 2 - 1, CHUNK // 2, CHUNK // 2 + 1)):
            content = [tensor("only", (num_elements,), dtype="BF16", seed=step)]
            staged = fetcher.fetch(self.publish(ring, step, content), timeout_seconds=SECONDS)
            assert_holds(staged, content)

    def test_many_versions_in_a_row_arrive(self, ring: SegmentRing, fetcher: WeightFetcher) -> None:
        for step in range(12):
            manifest = self.publish(ring, step, tensors(seed=step))
            assert_holds(fetcher.fetch(manifest, timeout_seconds=SECONDS), tensors(seed=step))

    def test_chunks_that_are_held_already_are_not_sent_again(
        self, ring: SegmentRing, fetcher: WeightFetcher, receiver: ObservedReceiver
    ) -> None:
        first = self.publish(ring, 0, tensors())
        fetcher.fetch(first, timeout_seconds=SECONDS)
        assert sorted(receiver.asked) == list(range(len(first.chunk_digests)))
        receiver.asked.clear()

        changed = [*tensors()[:-1], tensor("tail", (1, 999), dtype="BF16", seed=77)]
        second = self.publish(ring, 1, changed)
        assert_holds(fetcher.fetch(second, timeout_seconds=SECONDS), changed)
        differing = [
            index
            for index, (old, new) in enumerate(zip(first.chunk_digests, second.chunk_digests, strict=True))
            if old != new
        ]
        assert receiver.asked == differing
        receiver.asked.clear()

        back = self.publish(ring, 2, tensors())
        assert_holds(fetcher.fetch(back, timeout_seconds=SECONDS), tensors())
        assert receiver.asked == []

    def test_a_late_joiner_takes_the_newest_version(self, ring: SegmentRing) -> None:
        for step in range(5):
            manifest = self.publish(ring, step, tensors(seed=step))
        fetcher = WeightFetcher([self.make_receiver()])
        assert_holds(fetcher.fetch(manifest, timeout_seconds=SECONDS), tensors(seed=4))
        fetcher.close()

    def test_a_version_that_was_overwritten_is_refused(
        self, ring: SegmentRing, fetcher: WeightFetcher
    ) -> None:
        old = self.publish(ring, 0, tensors(seed=0))
        for step in range(1, 4):
            newest = self.publish(ring, step, tensors(seed=step))
        with pytest.raises(WeightTransferError, match=rf"version {self.epoch}\.0"):
            fetcher.fetch(old, timeout_seconds=SECONDS)
        assert_holds(fetcher.fetch(newest, timeout_seconds=SECONDS), tensors(seed=3))

    def test_a_version_that_is_overwritten_as_it_is_read_is_refused(self, ring: SegmentRing) -> None:
        def overwrite(number: int) -> None:
            if number == 2:
                for step in range(1, 4):
                    self.publish(ring, step, tensors(seed=step))

        more_than_is_in_flight = [tensor("long", (200 * CHUNK // 4,))]
        first = self.publish(ring, 0, more_than_is_in_flight)
        fetcher = WeightFetcher([ObservedReceiver(self.make_receiver(), before=overwrite)])
        with pytest.raises(WeightTransferError, match=rf"version {self.epoch}\.0"):
            fetcher.fetch(first, timeout_seconds=SECONDS)
        fetcher.close()

    def test_a_corrupt_chunk_is_refused_and_spoils_nothing(
        self, ring: SegmentRing, fetcher: WeightFetcher
    ) -> None:
        held = fetcher.fetch(self.publish(ring, 0, tensors(seed=0)), timeout_seconds=SECONDS)
        manifest = self.publish(ring, 1, tensors(seed=9))
        flip_byte(self.segment, 2 * CHUNK + 5)
        with pytest.raises(WeightTransferError, match="digest"):
            fetcher.fetch(manifest, timeout_seconds=SECONDS)
        assert_holds(held, tensors(seed=0))

        flip_byte(self.segment, 2 * CHUNK + 5)
        assert_holds(fetcher.fetch(manifest, timeout_seconds=SECONDS), tensors(seed=9))

    def test_after_a_failure_only_the_bad_chunk_is_asked_for_again(
        self, ring: SegmentRing, fetcher: WeightFetcher, receiver: ObservedReceiver
    ) -> None:
        manifest = self.publish(ring, 0, tensors(seed=0))
        flip_byte(self.segment, 3 * CHUNK)
        with pytest.raises(WeightTransferError, match="digest"):
            fetcher.fetch(manifest, timeout_seconds=SECONDS)
        flip_byte(self.segment, 3 * CHUNK)
        receiver.asked.clear()
        assert_holds(fetcher.fetch(manifest, timeout_seconds=SECONDS), tensors(seed=0))
        assert receiver.asked == [3]

    def test_a_fetch_that_is_abandoned_ends(self, ring: SegmentRing, fetcher: WeightFetcher) -> None:
        abandoned = threading.Event()
        abandoned.set()
        manifest = self.publish(ring, 0, tensors())
        with pytest.raises(WeightTransferError, match="abandoned"):
            fetcher.fetch(manifest, timeout_seconds=SECONDS, abandoned=abandoned)
        assert_holds(fetcher.fetch(manifest, timeout_seconds=SECONDS), tensors())

    def test_what_was_fetched_last_stays_intact_while_the_next_is_staged(
        self, ring: SegmentRing, fetcher: WeightFetcher
    ) -> None:
        first = fetcher.fetch(self.publish(ring, 0, tensors(seed=0)), timeout_seconds=SECONDS)
        second = fetcher.fetch(self.publish(ring, 1, tensors(seed=1)), timeout_seconds=SECONDS)
        assert_holds(first, tensors(seed=0))
        assert_holds(second, tensors(seed=1))
