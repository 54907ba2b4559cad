"""Memory that a version, or a chain of deltas, is gathered in, chunk by chunk."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.weights.manifest import Blob, verify_chunk


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
            data = np.zeros(blob.num_bytes, dtype=np.uint8)
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

    def put(self, index: int, data: NDArray[np.uint8]) -> None:
        """Copies a chunk in, then verifies the copy."""
        assert self._blob is not None
        where = self._blob.chunk(index)
        if data.size == where.stop - where.start:
            self._data[where] = data
            self.verify(index)

    def verify(self, index: int) -> None:
        """Notes whether what lies in a chunk's place is that chunk."""
        assert self._blob is not None
        self._present[index] = verify_chunk(self._blob, index, self._data[self._blob.chunk(index)])

    def _chunks_by_digest(self) -> dict[bytes, NDArray[np.uint8]]:
        if self._blob is None:
            return {}
        return {
            digest: self._data[self._blob.chunk(index)]
            for index, digest in enumerate(self._blob.chunk_digests)
            if self._present[index]
        }

    def _held_at_same_place(self, blob: Blob) -> set[int]:
        """Chunks that are where the new blob wants them."""
        old = self._blob
        if old is None:
            return set()
        pairs = zip(old.chunk_digests, blob.chunk_digests, strict=False)
        return {
            index
            for index, (held, wanted) in enumerate(pairs)
            if held == wanted and self._present[index] and old.chunk(index) == blob.chunk(index)
        }
