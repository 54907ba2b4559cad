"""From an older version to a newer one by deltas, for a receiver on another host.

Two ways lead there: deltas from the version that is held, or the learner's snapshot and the
deltas after it. The one of fewer bytes is taken. What a transfer that broke has brought stays
for the next attempt, also when that is for a newer version: chunks are known by their digests.
Nothing is believed: the deltas' chunks are verified, and so is every chunk that they make.
Applying goes on while bytes arrive, block by block.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.weights.buffer import ChunkBuffer, num_threads
from penstock.weights.manifest import Blob, Delta, Manifest, Medium, Snapshot
from penstock.weights.media.base import Patience, WeightReceiver

if TYPE_CHECKING:
    from penstock.weights.delta import Change

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain(Blob):
    """Deltas one behind the other, fetched as one: all their first parts, then all their second ones.

    Deltas have their frames in the order of the version's bytes, so what is the same tensors' comes together.
    """

    deltas: tuple[Delta, ...]
    starts: tuple[int, ...]
    """Where each begins, in bytes."""
    places: tuple[tuple[int, int], ...]
    """For each chunk its delta, and its index in it."""

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Self:
        sizes = [delta.num_bytes for delta in deltas]
        places = sorted(
            (
                (number, index)
                for number, delta in enumerate(deltas)
                for index in range(len(delta.chunk_digests))
            ),
            key=lambda place: deltas[place[0]].chunk(place[1]).stop / sizes[place[0]],
        )
        return cls(
            version=deltas[-1].version,
            num_bytes=sum(sizes),
            chunk_bytes=deltas[-1].chunk_bytes,
            chunk_digests=tuple(deltas[number].chunk_digests[index] for number, index in places),
            digest=deltas[-1].digest,
            deltas=tuple(deltas),
            starts=tuple(sum(sizes[:number]) for number in range(len(sizes))),
            places=tuple(places),
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
        missing_bytes = sum(manifest.size_of(index) for index in staging.missing())
        if way is None or (way.snapshot is None and way.num_bytes > missing_bytes):
            return
        chain = Chain.of(way.deltas)
        self._chain.prepare(chain)
        base = newest if way.snapshot is None else self._snapshot
        with _Making(chain, self._chain, base, staging, patience) as making:
            if way.snapshot is None:
                making.base_arrived(manifest.num_bytes)
            _fetch(receiver, medium, chain, self._chain, patience, making.deltas_arrived)
            if way.snapshot is not None:
                self._snapshot.prepare(way.snapshot)
                size, end = way.snapshot.chunk_bytes, manifest.num_bytes
                _fetch(
                    receiver, medium, way.snapshot, self._snapshot, patience,
                    lambda num_chunks: making.base_arrived(min(num_chunks * size, end)),
                )  # fmt: skip
        staging.verify(staging.missing())
        self._snapshot = ChunkBuffer()
        if staging.missing():
            _log.warning(
                "deltas did not make version %s of what was held: %d chunks differ; fetching those whole",
                manifest.version, len(staging.missing()),
            )  # fmt: skip


def _fetch(
    receiver: WeightReceiver,
    medium: Medium,
    blob: Blob,
    into: ChunkBuffer,
    patience: Patience,
    arrived: Callable[[int], None],
) -> None:
    """Fetches what is missing of a blob. Tells how many of its first chunks are here, whenever that grows.

    What is done with them meanwhile costs no time while the credits keep the line busy.
    """
    missing = into.missing()
    arrived(missing[0] if missing else len(blob.chunk_digests))
    here = set[int]()
    first = 0
    if missing:
        with contextlib.closing(receiver.chunks(blob, medium, missing, patience)) as chunks:
            for index, data in chunks:
                if into.put(index, data):
                    here.add(index)
                before = first
                while first < len(missing) and missing[first] in here:
                    first += 1
                if first > before:
                    arrived(missing[first] if first < len(missing) else len(blob.chunk_digests))
    if into.missing():
        raise WeightTransferError(
            f"{len(into.missing())} chunks on the way to version {blob.version} arrived with another digest"
        )


class _Making:
    """Makes a version of a base and deltas while they arrive.

    Once a block of the base and all changes to it are here, a thread applies them one after the other, and
    verifies what came of it, while the block is in the cache.
    """

    def __init__(
        self, chain: Chain, arrived: ChunkBuffer, base: ChunkBuffer, staging: ChunkBuffer, patience: Patience
    ) -> None:
        from penstock.weights.delta import ArrivingDelta

        self._chain = chain
        self._deltas = [ArrivingDelta(data, staging.packed.size) for data in chain.parts(arrived.packed)]
        self._known = [0] * len(self._deltas)
        """Up to which byte of the version each delta's changes are here."""
        self._num_chunks = 0
        self._base = base
        self._base_here = 0
        self._staging = staging
        self._done = 0
        self._patience = patience
        self._makers = ThreadPoolExecutor(num_threads(), thread_name_prefix="deltas")
        self._blocks: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Returns once no thread works any more. Raises WeightTransferError for deltas that contradict themselves."""
        self._makers.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for block in self._blocks:
                block.result()

    def base_arrived(self, num_bytes: int) -> None:
        """The base's first bytes are here."""
        self._base_here = num_bytes
        self._advance()

    def deltas_arrived(self, num_chunks: int) -> None:
        """The chain's first chunks are here."""
        ends = dict(self._chain.places[self._num_chunks : num_chunks])
        self._num_chunks = num_chunks
        for number, index in ends.items():
            here = self._chain.deltas[number].chunk(index).stop
            self._known[number] = self._deltas[number].arrived(here)
        self._advance()

    def _advance(self) -> None:
        from penstock.weights.delta import FRAME_BYTES

        size = self._staging.packed.size
        ready = min(self._base_here, *self._known)
        while self._done < size and min(self._done + FRAME_BYTES, size) <= ready:
            self._patience.check("deltas to be applied")
            start, self._done = self._done, min(self._done + FRAME_BYTES, size)
            made = self._staging.invalidate(start, self._done)
            changes = [(delta.data, frame) for delta in self._deltas for frame in delta.take(self._done)]
            self._blocks.append(self._makers.submit(self._make, start, self._done, changes, made))

    def _make(self, start: int, end: int, changes: Sequence[Change], made: Sequence[int]) -> None:
        from penstock.weights.delta import FrameDecoder

        target = self._staging.packed
        target[start:end] = self._base.packed[start:end]
        FrameDecoder().apply(changes, target)
        # A chunk that begins in the block before is verified at the end.
        whole = [index for index in made if self._staging.begins(index) >= start]
        self._staging.verify(whole)
