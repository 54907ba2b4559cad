"""The log of versions, and actors on other hosts that catch up by it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np
import pytest

from penstock.codec import manifest_from_wire, manifest_to_wire
from penstock.errors import ProtocolError, WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights import version_log
from penstock.weights.catching_up import shortest_way
from penstock.weights.delta import encode_version
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import HostTensor, Manifest, ZeromqMedium, check_manifest
from penstock.weights.media.zeromq import ZeromqReceiver, ZeromqServer
from penstock.weights.segment import segment_path
from penstock.weights.staged import StagedWeights, stage
from penstock.weights.version_log import KEPT_DELTAS, VersionLog
from tests.weight_fixtures import CHUNK, ObservedReceiver, assert_holds, flip_byte, moved, tensor, tensors

SECONDS = 30.0


class Learner:
    """Trains: each version is the one before it, moved. A server offers it to other hosts."""

    def __init__(self, **settings: int) -> None:
        self.log = VersionLog(name_prefix="penstock-test-log", chunk_bytes=CHUNK, **settings)
        self.server = ZeromqServer("tcp://127.0.0.1:0", num_versions=2)
        self.content = [tensor("long", (9_000,), dtype="BF16"), *tensors()]
        self.step = 0

    def publish(self, content: list[HostTensor] | None = None, *, with_delta: bool = True) -> Manifest:
        """As it reaches an actor of another host."""
        self.content = moved(self.content, self.step) if content is None else content
        written = self.log.write(PolicyVersion(1, self.step), self.content, with_delta=with_delta)
        self.step += 1
        self.server.add(written)
        offered = dataclasses.replace(written, media=(ZeromqMedium(endpoint=self.server.endpoint),))
        return manifest_from_wire(manifest_to_wire(offered))

    def close(self) -> None:
        self.server.close()
        self.log.close()


class Actor:
    def __init__(self) -> None:
        self.receiver = ObservedReceiver(ZeromqReceiver())
        self.fetcher = WeightFetcher([self.receiver])

    def fetch(self, manifest: Manifest) -> StagedWeights:
        self.receiver.asked.clear()
        return self.fetcher.fetch(manifest, timeout_seconds=SECONDS)

    @property
    def num_chunks(self) -> int:
        """That the last fetch asked for."""
        return len(self.receiver.asked)


@pytest.fixture
def learner() -> Iterator[Learner]:
    learner = Learner()
    yield learner
    learner.close()


@pytest.fixture
def actor() -> Iterator[Actor]:
    actor = Actor()
    yield actor
    actor.fetcher.close()


def test_who_holds_the_version_before_fetches_a_delta(learner: Learner, actor: Actor) -> None:
    actor.fetch(learner.publish())
    assert actor.num_chunks > 10
    staged = actor.fetch(learner.publish())
    assert_holds(staged, learner.content)
    assert actor.num_chunks == 1


def test_who_is_several_versions_late_fetches_the_deltas_since(learner: Learner, actor: Actor) -> None:
    actor.fetch(learner.publish())
    for _ in range(5):
        manifest = learner.publish()
    assert_holds(actor.fetch(manifest), learner.content)
    assert actor.num_chunks == 5


def test_deltas_of_any_size_come_in_a_few_chunks(
    learner: Learner, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_log, "MIN_DELTA_CHUNK_BYTES", 1024)
    content = tensor("long", (200_000,), dtype="BF16")
    actor.fetch(learner.publish([content]))
    generator = np.random.default_rng(0)
    for num_changes in (1_000, 8_000, 25_000):
        words = content.data.view(np.uint16).copy()
        places = generator.choice(words.size, num_changes, replace=False)
        words[places] ^= generator.integers(1, 1 << 16, num_changes, dtype=np.uint16)
        content = dataclasses.replace(content, data=words.view(np.uint8))
        newest = learner.publish([content])
    assert [delta.chunk_bytes for delta in newest.deltas] == [1024, 2048, CHUNK], "no larger than a version's"
    assert_holds(actor.fetch(newest), [content])
    assert actor.num_chunks == sum(len(delta.chunk_digests) for delta in newest.deltas)


def test_who_holds_nothing_fetches_the_snapshot_and_the_deltas_after_it(
    learner: Learner, actor: Actor
) -> None:
    first = learner.publish()
    for _ in range(6):
        manifest = learner.publish()
    assert manifest.snapshot is not None
    assert manifest.snapshot.digest == first.digest
    assert_holds(actor.fetch(manifest), learner.content)
    assert actor.num_chunks == len(first.chunk_digests) + 6


def test_the_snapshot_is_served_though_the_ring_went_round(learner: Learner, actor: Actor) -> None:
    """A joiner whose transfer takes several publications gets along: what it began with stays."""
    manifest = learner.publish()
    breaks = WeightFetcher([ObservedReceiver(ZeromqReceiver(), before=_break_at(5))])
    with pytest.raises(WeightTransferError, match="cut"):
        breaks.fetch(manifest, timeout_seconds=SECONDS)
    for _ in range(9):
        manifest = learner.publish()
    assert_holds(breaks.fetch(manifest, timeout_seconds=SECONDS), learner.content)
    breaks.close()


def test_a_broken_transfer_goes_on_where_it_ended_also_for_a_newer_version(learner: Learner) -> None:
    learner.publish()
    manifest = learner.publish()
    assert manifest.snapshot is not None
    num_chunks = len(manifest.snapshot.chunk_digests)
    receiver = ObservedReceiver(ZeromqReceiver(), before=_break_at(8))
    fetcher = WeightFetcher([receiver])
    # Without a second attempt over the whole version: that one breaks too.
    with pytest.raises(WeightTransferError, match="cut"):
        fetcher.fetch(manifest, timeout_seconds=SECONDS)
    receiver.asked.clear()
    manifest = learner.publish()
    assert_holds(fetcher.fetch(manifest, timeout_seconds=SECONDS), learner.content)
    assert len(receiver.asked) == num_chunks - 8 + 1, "and the one delta that is new"
    fetcher.close()


def test_a_new_snapshot_is_taken_every_few_versions(actor: Actor) -> None:
    learner = Learner(snapshot_every=3)
    snapshots = []
    for _ in range(8):
        manifest = learner.publish()
        assert manifest.snapshot is not None
        snapshots.append(manifest.snapshot.version.step)
        late = Actor()
        assert_holds(late.fetch(manifest), learner.content)
        late.fetcher.close()
    assert snapshots == [0, 0, 0, 3, 3, 3, 6, 6]
    learner.close()


def test_the_log_is_bounded_and_its_segments_go(learner: Learner, actor: Actor) -> None:
    learner.publish()
    first = learner.publish().deltas[0]
    for _ in range(KEPT_DELTAS + 5):
        manifest = learner.publish()
    assert len(manifest.deltas) <= KEPT_DELTAS
    assert sum(delta.num_bytes for delta in manifest.deltas) <= manifest.num_bytes // 2
    assert segment_path(first.segment.name) is None
    assert_holds(actor.fetch(manifest), learner.content)


def test_without_a_wish_for_deltas_there_are_none(learner: Learner, actor: Actor) -> None:
    learner.publish(with_delta=False)
    manifest = learner.publish(with_delta=False)
    assert (manifest.deltas, manifest.snapshot) == ((), None)
    assert_holds(actor.fetch(manifest), learner.content)
    assert_holds(actor.fetch(learner.publish()), learner.content)
    assert actor.num_chunks == 1


def test_other_tensors_have_no_delta_to_them(learner: Learner, actor: Actor) -> None:
    actor.fetch(learner.publish())
    manifest = learner.publish([tensor("other", (5000,), dtype="F16")])
    assert manifest.deltas == ()
    assert_holds(actor.fetch(manifest), learner.content)


def test_a_version_that_changed_everywhere_is_fetched_whole(learner: Learner, actor: Actor) -> None:
    actor.fetch(learner.publish())
    manifest = learner.publish([tensor("long", (9_000,), dtype="BF16", seed=8), *tensors(seed=9)])
    assert manifest.deltas == ()
    assert_holds(actor.fetch(manifest), learner.content)


def test_a_version_equal_to_the_one_before_costs_nothing(learner: Learner, actor: Actor) -> None:
    actor.fetch(learner.publish())
    manifest = learner.publish(learner.content)
    assert_holds(actor.fetch(manifest), learner.content)
    assert actor.num_chunks == 0
    assert_holds(actor.fetch(learner.publish()), learner.content)
    assert actor.num_chunks == 1


def test_a_wrong_base_ends_in_the_whole_version(
    learner: Learner, actor: Actor, caplog: pytest.LogCaptureFixture
) -> None:
    """The held version has the digest that the delta names, but not the bytes: a fault of memory."""
    held = actor.fetch(learner.publish())
    held.buffer[100] ^= 4
    with caplog.at_level(logging.WARNING):
        assert_holds(actor.fetch(learner.publish()), learner.content)
    assert "deltas did not make version 1.1" in caplog.text
    assert "1 chunks differ" in caplog.text


def test_a_corrupt_delta_ends_in_the_whole_version(
    learner: Learner, actor: Actor, caplog: pytest.LogCaptureFixture
) -> None:
    held = actor.fetch(learner.publish())
    before = held.buffer.copy()
    manifest = learner.publish()
    flip_byte(manifest.deltas[0].segment.name, 60)
    with caplog.at_level(logging.WARNING):
        assert_holds(actor.fetch(manifest), learner.content)
    assert "arrived with another digest" in caplog.text
    assert np.array_equal(held.buffer, before), "what was held is intact"


def test_a_delta_that_is_gone_ends_in_the_whole_version(learner: Learner, actor: Actor) -> None:
    actor.fetch(learner.publish())
    late = learner.publish()
    for _ in range(KEPT_DELTAS + 20):
        learner.publish()
    manifest = learner.publish()
    stale = dataclasses.replace(manifest, deltas=(*late.deltas, *manifest.deltas))
    assert_holds(actor.fetch(stale), learner.content)


def test_no_room_for_a_delta_leaves_the_version_whole(
    learner: Learner, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(prefix: str, num_bytes: int) -> None:
        raise WeightTransferError("no room")

    actor.fetch(learner.publish())
    with monkeypatch.context() as patch:
        patch.setattr("penstock.weights.version_log.create_segment", full)
        assert learner.publish().deltas == ()
    manifest = learner.publish()
    assert len(manifest.deltas) == 1
    assert_holds(actor.fetch(manifest), learner.content)


def test_a_version_is_made_of_the_one_before_and_a_delta(learner: Learner, actor: Actor) -> None:
    """As ranks do that send rank 0 only what changed."""
    actor.fetch(learner.publish())
    old = stage(PolicyVersion(1, 0), learner.content)
    content = moved(learner.content, 1)
    new = stage(PolicyVersion(1, 1), content)
    delta = np.frombuffer(encode_version(new.manifest.tensors, old.buffer, new.buffer), dtype=np.uint8)
    written = learner.log.write_delta(PolicyVersion(1, 1), delta)
    assert written.deltas[-1].result == written.digest
    learner.server.add(written)
    offered = dataclasses.replace(written, media=(ZeromqMedium(endpoint=learner.server.endpoint),))
    assert_holds(actor.fetch(offered), content)
    assert actor.num_chunks == 1


def test_the_way_of_fewest_bytes_is_taken(learner: Learner) -> None:
    first = learner.publish()
    second = learner.publish()
    manifest = learner.publish()
    from_second = shortest_way(manifest, second.digest)
    assert from_second is not None
    assert (from_second.snapshot, len(from_second.deltas)) == (None, 1)
    from_nothing = shortest_way(manifest, None)
    assert from_nothing is not None
    assert (from_nothing.snapshot, len(from_nothing.deltas)) == (manifest.snapshot, 2)
    assert shortest_way(first, None) is None
    long_way = dataclasses.replace(
        manifest,
        deltas=tuple(dataclasses.replace(each, num_bytes=manifest.num_bytes) for each in manifest.deltas),
    )
    newer_snapshot = dataclasses.replace(long_way, snapshot=_snapshot_of(second, manifest))
    way = shortest_way(newer_snapshot, first.digest)
    assert way is not None
    assert (way.snapshot, len(way.deltas)) == (None, 2), "a tie: nothing is gained by the snapshot"


def test_a_manifest_whose_deltas_do_not_lead_to_it_is_refused(learner: Learner) -> None:
    for _ in range(3):
        manifest = learner.publish()
    one, two = manifest.deltas
    assert manifest.snapshot is not None
    broken = [
        {"deltas": (one,)},
        {"deltas": (two, one)},
        {"deltas": (dataclasses.replace(two, num_bytes=manifest.num_bytes + 1),)},
        {"deltas": (dataclasses.replace(two, num_bytes=0, chunk_digests=()),)},
        {"deltas": (dataclasses.replace(two, chunk_digests=()),)},
        {"deltas": (two,) * 65},
        {"snapshot": dataclasses.replace(manifest.snapshot, digest=manifest.digest)},
        {"snapshot": dataclasses.replace(manifest.snapshot, chunk_digests=())},
    ]
    check_manifest(manifest)
    for changes in broken:
        with pytest.raises(ProtocolError):
            check_manifest(dataclasses.replace(manifest, **changes))  # type: ignore[arg-type]


def _snapshot_of(version: Manifest, manifest: Manifest) -> object:
    assert manifest.snapshot is not None
    return dataclasses.replace(
        manifest.snapshot, version=version.version, digest=version.digest, chunk_digests=version.chunk_digests
    )


def _break_at(number: int):  # type: ignore[no-untyped-def]
    """Cuts the line before the chunk of that number arrives, and again at the start of the next try; then never."""
    times = iter([number, 0])
    cut_at = [next(times)]

    def cut(arrived: int) -> None:
        if cut_at[0] is not None and arrived == cut_at[0]:
            cut_at[0] = next(times, None)
            raise WeightTransferError("the line was cut")

    return cut
