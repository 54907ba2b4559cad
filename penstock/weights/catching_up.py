"""From an older version to a newer one by deltas, for a receiver on another host.

Two ways lead there: deltas from the version that is held, or the learner's snapshot and the
deltas after it. The one of fewer bytes is taken. What a transfer that broke has brought stays
for the next attempt, also when that is for a newer version: chunks are known by their digests.
Nothing is believed: the deltas' chunks are verified, and so is every chunk that they make.
Applying goes on while bytes arrive: delta by delta, or block by block of the snapshot.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.weights.buffer import ChunkBuffer, num_threads
from penstock.weights.manifest import Blob, Delta, Manifest, Medium, Snapshot
from penstock.weights.media.base import Patience, WeightReceiver

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain(Blob):
    """Deltas one behind the other, fetched as one."""

    deltas: tuple[Delta, ...]
    starts: tuple[int, ...]
    """Where each begins, in bytes."""
    places: tuple[tuple[int, int], ...]
    """For each chunk its delta, and its index in it."""

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Self:
        sizes = [delta.num_bytes for delta in deltas]
        return cls(
            version=deltas[-1].version,
            num_bytes=sum(sizes),
            chunk_bytes=deltas[-1].chunk_bytes,
            chunk_digests=tuple(digest for delta in deltas for digest in delta.chunk_digests),
            digest=deltas[-1].digest,
            deltas=tuple(deltas),
            starts=tuple(sum(sizes[:number]) for number in range(len(sizes))),
            places=tuple(
                (number, index)
                for number, delta in enumerate(deltas)
                for index in range(len(delta.chunk_digests))
            ),
        )

    def chunk(self, index: int) -> slice:
        number, within = self.places[index]
        where = self.deltas[number].chunk(within)
        return slice(self.starts[number] + where.start, self.starts[number] + where.stop)

    def origin(self, index: int) -> tuple[str, int]:
        number, within = self.places[index]
        return self.deltas[number].digest, within

    def parts(self, data: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        """Each delta's bytes."""
        for start, delta in zip(self.starts, self.deltas, strict=True):
            yield data[start : start + delta.num_bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a version is reached."""

    snapshot: Snapshot | None
    """Where it begins; None for the version that is held."""
    deltas: tuple[Delta, ...]

    @property
    def num_bytes(self) -> int:
        start = 0 if self.snapshot is None else self.snapshot.num_bytes
        return start + sum(delta.num_bytes for delta in self.deltas)


def shortest_way(manifest: Manifest, held: str | None) -> Way | None:
    """The way of fewest bytes; None if there is none but to fetch the version whole.

    held: digest of the version that the receiver has, whole.
    """
    ways = []
    from_held = _from(manifest, held)
    if from_held:
        ways.append(Way(snapshot=None, deltas=from_held))
    snapshot = manifest.snapshot
    if snapshot is not None:
        from_snapshot = _from(manifest, snapshot.digest)
        if from_snapshot:
            ways.append(Way(snapshot=snapshot, deltas=from_snapshot))
    return min(ways, key=lambda way: way.num_bytes, default=None)


def _from(manifest: Manifest, base: str | None) -> tuple[Delta, ...]:
    starts = [number for number, delta in enumerate(manifest.deltas) if delta.base == base]
    return manifest.deltas[starts[-1] :] if starts else ()


class CatchingUp:
    """What is fetched to get from one version to another."""

    def __init__(self) -> None:
        self._chain = ChunkBuffer()
        self._snapshot = ChunkBuffer()

    def advance(
        self,
        receiver: WeightReceiver,
        medium: Medium,
        newest: ChunkBuffer,
        staging: ChunkBuffer,
        patience: Patience,
    ) -> None:
        """Makes the version that `staging` is prepared for, as far as a way leads to it.

        newest: the version that is held. It is not changed. Chunks that do not turn out as the
        manifest says stay missing. Raises WeightTransferError when the transfer breaks.
        """
        manifest = staging.blob
        assert isinstance(manifest, Manifest)
        way = shortest_way(manifest, newest.blob.digest if newest.blob is not None else None)
        missing_bytes = sum(_size(manifest, index) for index in staging.missing())
        if way is None or (way.snapshot is None and way.num_bytes > missing_bytes):
            return
        chain = Chain.of(way.deltas)
        with contextlib.closing(_arrivals(receiver, medium, chain, self._chain, patience)) as arrivals:
            if way.snapshot is None:
                _advance_by_delta(chain, arrivals, self._chain, newest, staging, patience)
            else:
                collections.deque(arrivals, maxlen=0)  # all of them, before the snapshot
        if way.snapshot is not None:
            deltas = chain.parts(self._chain.packed)
            snapshot = _arrivals(receiver, medium, way.snapshot, self._snapshot, patience)
            with contextlib.closing(snapshot) as arrivals:
                _advance_by_block(deltas, arrivals, self._snapshot, staging, patience)
        self._snapshot = ChunkBuffer()
        if staging.missing():
            _log.warning(
                "deltas did not make version %s of what was held: %d chunks differ; fetching those whole",
                manifest.version, len(staging.missing()),
            )  # fmt: skip


def _arrivals(
    receiver: WeightReceiver, medium: Medium, blob: Blob, into: ChunkBuffer, patience: Patience
) -> Generator[int, None, None]:
    """Fetches what is missing of a blob. Yields up to which byte it is here, whenever a chunk has come.

    What the caller does meanwhile costs no time while the credits keep the line busy.
    """
    into.prepare(blob)
    missing = into.missing()
    yield _start(blob, missing)
    here = set[int]()
    first = 0
    with contextlib.closing(receiver.chunks(blob, medium, missing, patience)) as chunks:
        for index, data in chunks if missing else ():
            if into.put(index, data):
                here.add(index)
            while first < len(missing) and missing[first] in here:
                first += 1
            yield _start(blob, missing[first : first + 1])
    if into.missing():
        raise WeightTransferError(
            f"{len(into.missing())} chunks on the way to version {blob.version} arrived with another digest"
        )


def _start(blob: Blob, missing: Sequence[int]) -> int:
    """Where the first missing chunk starts."""
    return int(blob.chunk(missing[0]).start) if missing else blob.num_bytes


def _advance_by_delta(
    chain: Chain,
    arrivals: Iterator[int],
    arrived: ChunkBuffer,
    base: ChunkBuffer,
    staging: ChunkBuffer,
    patience: Patience,
) -> None:
    """Applies the deltas that are here to the whole version while the following ones arrive."""
    from penstock.weights.delta import apply_all

    target, applied = staging.packed, 0
    ends = [start + delta.num_bytes for start, delta in zip(chain.starts, chain.deltas, strict=True)]
    for here in arrivals:
        complete = bisect.bisect_right(ends, here)
        if complete == applied:
            continue
        patience.check("deltas to be applied")
        if not applied:
            staging.invalidate(0, target.size)
            target[:] = base.packed
        parts = list(chain.parts(arrived.packed))[applied:complete]
        apply_all(parts, target, num_threads=num_threads())
        applied = complete
    staging.verify(staging.missing())


def _advance_by_block(
    deltas: Iterator[NDArray[np.uint8]],
    arrivals: Iterator[int],
    base: ChunkBuffer,
    staging: ChunkBuffer,
    patience: Patience,
) -> None:
    """Applies all deltas to each block of the base as soon as it has arrived, and verifies it in the cache."""
    from penstock.weights.delta import FRAME_BYTES, AppliedDelta, FrameDecoder

    target, decoder, done = staging.packed, FrameDecoder(), 0
    applied = [AppliedDelta(data, target.size) for data in deltas]
    for here in arrivals:
        while done < target.size and min(done + FRAME_BYTES, target.size) <= here:
            patience.check("deltas to be applied")
            end = min(done + FRAME_BYTES, target.size)
            made = staging.invalidate(done, end)
            target[done:end] = base.packed[done:end]
            for each in applied:
                each.apply(decoder, target, end)
            staging.verify(made)
            done = end


def _size(blob: Blob, index: int) -> int:
    where = blob.chunk(index)
    return int(where.stop - where.start)
