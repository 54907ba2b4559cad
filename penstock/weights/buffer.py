"""Memory that a version, or a chain of deltas, is gathered in, chunk by chunk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from penstock.weights.manifest import Blob, verify_chunk

_MANY = 16
"""Chunks that are worth a thread."""
_MAX_THREADS = 4


def num_threads() -> int:
    """How many threads work on one version."""
    return min(_MAX_THREADS, os.cpu_count() or 1)


class ChunkBuffer:
    """One blob's bytes, and which of its chunks are verified to be there."""

    def __init__(self) -> None:
        self._data: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._blob: Blob | None = None
        self._present: list[bool] = []

    def prepare(self, blob: Blob, other: ChunkBuffer | None = None) -> None:
        """Makes room for a blob, keeping or copying the chunks that this buffer or the other one holds."""
        elsewhere = {} if other is None else other._chunks_by_digest()
        kept = self._held_at_same_place(blob)
        if self._data.size < blob.num_bytes:
            data = self._allocate(blob.num_bytes)
            for index in kept:
                data[blob.chunk(index)] = self._data[blob.chunk(index)]
            self._data = data
        present = [index in kept for index in range(len(blob.chunk_digests))]
        for index, digest in enumerate(blob.chunk_digests):
            source = None if present[index] else elsewhere.get(digest)
            where = blob.chunk(index)
            if source is not None and source.size == where.stop - where.start:
                self._data[where] = source
                present[index] = True
        self._blob, self._present = blob, present

    def show(self) -> None:
        """The blob may be whole now: who shares buffers with others tells them."""

    @property
    def blob(self) -> Blob | None:
        """What this buffer was prepared for."""
        return self._blob

    @property
    def packed(self) -> NDArray[np.uint8]:
        """[num_bytes] uint8, in place."""
        assert self._blob is not None
        return self._data[: self._blob.num_bytes]

    def missing(self) -> list[int]:
        return [index for index, present in enumerate(self._present) if not present]

    def put(self, index: int, data: NDArray[np.uint8]) -> bool:
        """Copies a chunk in, then verifies the copy. Returns whether it is that chunk."""
        assert self._blob is not None
        where = self._blob.chunk(index)
        if data.size == where.stop - where.start:
            self._data[where] = data
            self.verify((index,))
        return self._present[index]

    def begins(self, index: int) -> int:
        """Where a chunk does, in bytes."""
        assert self._blob is not None
        return int(self._blob.chunk(index).start)

    def invalidate(self, start: int, end: int) -> range:
        """Counts the chunks that reach into some bytes as missing, which are about to be overwritten.

        Returns those that end there too, and with `end` at the blob's end all that do.
        """
        assert self._blob is not None
        size = self._blob.chunk_bytes
        last = -(-end // size)
        self._present[start // size : last] = [False] * (last - start // size)
        return range(start // size, last if end == self._blob.num_bytes else end // size)

    def verify(self, indices: Sequence[int]) -> None:
        """Notes of each chunk whether what lies in its place is that chunk."""
        blob = self._blob
        assert blob is not None

        def holds(index: int) -> bool:
            return verify_chunk(blob, index, self._data[blob.chunk(index)])

        if len(indices) < _MANY:
            results = [holds(index) for index in indices]
        else:
            # BLAKE3 runs without the interpreter's lock.
            with ThreadPoolExecutor(num_threads()) as threads:
                results = list(threads.map(holds, indices, chunksize=_MANY))
        for index, result in zip(indices, results, strict=True):
            self._present[index] = result

    def _allocate(self, num_bytes: int) -> NDArray[np.uint8]:
        """Zeros."""
        return np.zeros(num_bytes, dtype=np.uint8)

    def _chunks_by_digest(self) -> dict[bytes, NDArray[np.uint8]]:
        if self._blob is None:
            return {}
        return {
            digest: self._data[self._blob.chunk(index)]
            for index, digest in enumerate(self._blob.chunk_digests)
            if self._present[index]
        }

    def _held_at_same_place(self, blob: Blob) -> set[int]:
        """Chunks that are where the new blob wants them, under whatever index."""
        old = self._blob
        if old is None:
            return set()
        held = {
            (old.chunk(index).start, old.chunk(index).stop): digest
            for index, digest in enumerate(old.chunk_digests)
            if self._present[index]
        }
        places = [
            (blob.chunk(index).start, blob.chunk(index).stop) for index in range(len(blob.chunk_digests))
        ]
        return {
            index
            for index, (place, digest) in enumerate(zip(places, blob.chunk_digests, strict=True))
            if held.get(place) == digest
        }
