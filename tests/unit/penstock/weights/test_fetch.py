"""The fetcher: media in order, two buffers, all or nothing."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.codec import manifest_from_wire, manifest_to_wire
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import (
    CollectiveMedium,
    HostTensor,
    Manifest,
    Medium,
    SharedMemoryMedium,
    ZeromqMedium,
)
from penstock.weights.media.base import Chunk, Patience
from penstock.weights.media.collective import CollectiveReceiver
from penstock.weights.media.zeromq import ZeromqServer
from penstock.weights.segment import SegmentRing
from penstock.weights.staged import StagedWeights, stage
from tests.unit.penstock.weights.test_manifest import tensor_tables
from tests.weight_fixtures import CHUNK, assert_holds, tensor, tensors

SHARED = SharedMemoryMedium(name="x.0000000000000000", nonce="")
NETWORK = ZeromqMedium(endpoint="tcp://127.0.0.1:1")


class FakeReceiver:
    """Hands out the bytes of staged versions, or fails with a message."""

    def __init__(self, kind: type[Medium], versions: Sequence[StagedWeights] = (), error: str = "") -> None:
        self._kind = kind
        self._versions = {each.manifest.version: each for each in versions}
        self._error = error
        self.num_chunks = 0

    @property
    def medium(self) -> type[Medium]:
        return self._kind

    def chunks(
        self, manifest: Manifest, medium: Medium, indices: Sequence[int], patience: Patience
    ) -> Iterator[Chunk]:
        for index in indices:
            patience.check("the fake")
            if self._error and self.num_chunks >= 2:
                raise WeightTransferError(self._error)
            self.num_chunks += 1
            yield index, self._versions[manifest.version].buffer[manifest.chunk(index)]

    def close(self) -> None:
        pass


def version(step: int, *, seed: int | None = None, media: tuple[Medium, ...] = (SHARED,)) -> StagedWeights:
    """Three chunks of 1 MiB."""
    content = [tensor("a", (700_000,), seed=step if seed is None else seed)]
    staged = stage(PolicyVersion(1, step), content)
    return dataclasses.replace(staged, manifest=dataclasses.replace(staged.manifest, media=media))


def test_a_version_is_fetched() -> None:
    wanted = version(0)
    staged = WeightFetcher([FakeReceiver(SharedMemoryMedium, [wanted])]).fetch(
        wanted.manifest, timeout_seconds=10
    )
    assert staged.manifest is wanted.manifest
    assert np.array_equal(staged.buffer, wanted.buffer)


def test_the_next_medium_brings_what_the_first_could_not(caplog: pytest.LogCaptureFixture) -> None:
    wanted = version(0, media=(SHARED, NETWORK))
    shared = FakeReceiver(SharedMemoryMedium, [wanted], error="torn down")
    network = FakeReceiver(ZeromqMedium, [wanted])
    with caplog.at_level(logging.WARNING):
        staged = WeightFetcher([shared, network]).fetch(wanted.manifest, timeout_seconds=10)
    assert np.array_equal(staged.buffer, wanted.buffer)
    assert (shared.num_chunks, network.num_chunks) == (2, 1)
    assert "SharedMemoryMedium: torn down" in caplog.text


def test_what_a_broadcast_brought_is_counted_and_the_rest_is_pulled() -> None:
    wanted = version(0, media=(CollectiveMedium(group="g"), NETWORK))
    broadcast = FakeReceiver(CollectiveMedium, [wanted], error="a member fell silent")
    network = FakeReceiver(ZeromqMedium, [wanted])
    fetcher = WeightFetcher([broadcast, network])
    staged = fetcher.fetch(wanted.manifest, timeout_seconds=10)
    assert np.array_equal(staged.buffer, wanted.buffer)
    assert (broadcast.num_chunks, network.num_chunks) == (2, 1)
    assert fetcher.came_over == "broadcast+zeromq"


def test_who_is_no_member_passes_a_broadcast_over_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    wanted = version(0, media=(CollectiveMedium(group="g"), NETWORK))
    outsider = CollectiveReceiver(host="127.0.0.1", device="cpu")
    fetcher = WeightFetcher([outsider, FakeReceiver(ZeromqMedium, [wanted])])
    with caplog.at_level(logging.INFO):
        fetcher.fetch(wanted.manifest, timeout_seconds=10)
    assert not caplog.text
    assert fetcher.came_over == "zeromq"
    fetcher.fetch(wanted.manifest, timeout_seconds=10)
    assert fetcher.num_fetched == {"zeromq": 1, "held": 1}


def test_when_every_medium_fails_each_reason_is_told() -> None:
    wanted = version(0, media=(SHARED, NETWORK))
    fetcher = WeightFetcher(
        [
            FakeReceiver(SharedMemoryMedium, [wanted], error="torn down"),
            FakeReceiver(ZeromqMedium, [version(0, seed=5)], error="unplugged"),
        ]
    )
    with pytest.raises(WeightTransferError, match=r"1 of 3 chunks.*torn down.*digest"):
        fetcher.fetch(wanted.manifest, timeout_seconds=10)


def test_a_manifest_without_a_known_medium_is_refused() -> None:
    for media in ((), (NETWORK,)):
        with pytest.raises(WeightTransferError, match="no medium of it is known"):
            WeightFetcher([FakeReceiver(SharedMemoryMedium)]).fetch(
                version(0, media=media).manifest, timeout_seconds=10
            )


def test_a_deadline_ends_a_fetch() -> None:
    wanted = version(0)
    fetcher = WeightFetcher([FakeReceiver(SharedMemoryMedium, [wanted])])
    with pytest.raises(WeightTransferError, match="out of time"):
        fetcher.fetch(wanted.manifest, timeout_seconds=-1)


def test_being_abandoned_is_not_a_reason_to_try_the_next_medium() -> None:
    abandoned = threading.Event()
    wanted = version(0, media=(SHARED, NETWORK))
    network = FakeReceiver(ZeromqMedium, [wanted])

    class Superseding(FakeReceiver):
        def chunks(self, *args: object) -> Iterator[Chunk]:
            abandoned.set()
            raise WeightTransferError("gone")
            yield  # type: ignore[unreachable]

    fetcher = WeightFetcher([Superseding(SharedMemoryMedium), network])
    with pytest.raises(WeightTransferError, match="abandoned"):
        fetcher.fetch(wanted.manifest, timeout_seconds=10, abandoned=abandoned)
    assert network.num_chunks == 0


def test_a_failed_fetch_leaves_the_fetched_version_and_its_chunks() -> None:
    first, second, third = version(0), version(1), version(2, seed=0)
    receiver = FakeReceiver(SharedMemoryMedium, [first])
    fetcher = WeightFetcher([receiver])
    held = fetcher.fetch(first.manifest, timeout_seconds=10)
    with pytest.raises(KeyError):
        fetcher.fetch(second.manifest, timeout_seconds=10)
    assert np.array_equal(held.buffer, first.buffer)
    receiver.num_chunks = 0
    assert np.array_equal(fetcher.fetch(third.manifest, timeout_seconds=10).buffer, first.buffer)
    assert receiver.num_chunks == 0


def test_versions_of_any_size_may_follow_each_other() -> None:
    sizes = [10, 700_000, 3, 700_000, 300_001, 1]
    versions = [
        stage(PolicyVersion(1, step), [tensor("a", (size,), seed=size)]) for step, size in enumerate(sizes)
    ]
    versions = [
        dataclasses.replace(each, manifest=dataclasses.replace(each.manifest, media=(SHARED,)))
        for each in versions
    ]
    fetcher = WeightFetcher([FakeReceiver(SharedMemoryMedium, versions)])
    for each in versions:
        staged = fetcher.fetch(each.manifest, timeout_seconds=10)
        assert np.array_equal(staged.buffer, each.buffer)


@settings(max_examples=30, deadline=None)
@given(tables=st.lists(tensor_tables(), min_size=1, max_size=4))
def test_every_table_survives_packing_the_wire_and_both_media(tables: list[list[HostTensor]]) -> None:
    ring = SegmentRing(name_prefix="penstock-test-fetch", chunk_bytes=64)
    server = ZeromqServer("tcp://127.0.0.1:0")
    local, remote = WeightFetcher(), WeightFetcher()
    try:
        for step, table in enumerate(tables):
            written = ring.write(PolicyVersion(1, step), table)
            server.add(written)
            over_network = dataclasses.replace(written, media=(ZeromqMedium(endpoint=server.endpoint),))
            for fetcher, manifest in ((local, written), (remote, over_network)):
                received = manifest_from_wire(manifest_to_wire(manifest))
                assert_holds(fetcher.fetch(received, timeout_seconds=30), table)
    finally:
        local.close()
        remote.close()
        server.close()
        ring.close()


def test_a_reader_on_another_host_falls_back_to_the_network(caplog: pytest.LogCaptureFixture) -> None:
    ring = SegmentRing(name_prefix="penstock-test-fetch", chunk_bytes=CHUNK)
    server = ZeromqServer("tcp://127.0.0.1:0")
    written = ring.write(PolicyVersion(1, 0), tensors())
    server.add(written)
    elsewhere = SharedMemoryMedium(name="penstock-test-fetch.0123456789abcdef", nonce="ab" * 16)
    manifest = dataclasses.replace(written, media=(elsewhere, ZeromqMedium(endpoint=server.endpoint)))
    fetcher = WeightFetcher()
    with caplog.at_level(logging.WARNING):
        assert_holds(fetcher.fetch(manifest, timeout_seconds=30), tensors())
    assert "not on this host" in caplog.text
    fetcher.close()
    server.close()
    ring.close()
