"""Where the bytes of a checkpoint go in a segment that another process reads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.weights.manifest import Manifest, TensorEntry, chunk_digest, num_chunks, table_digest
from penstock.weights.staged import StagedWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of one tensor that stay together."""

    tensor: str
    start: int
    """In the tensor."""
    place: int
    """In the segment."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The pieces of every tensor, and the size of the segment that they fill."""

    pieces: tuple[Piece, ...]
    num_bytes: int

    @classmethod
    def of(
        cls, tensors: Sequence[TensorEntry], rows: Sequence[tuple[int, int, int]], num_bytes: int
    ) -> Placement:
        """From rows of (offset among the packed tensors, offset in the segment, number of bytes)."""
        starts = [tensor.offset for tensor in tensors]
        pieces = []
        for offset, place, size in rows:
            tensor = tensors[bisect_right(starts, offset) - 1]
            pieces.append(
                Piece(tensor=tensor.name, start=offset - tensor.offset, place=place, num_bytes=size)
            )
        return cls(pieces=tuple(pieces), num_bytes=num_bytes)

    def write(self, staged: StagedWeights, names: Mapping[str, str], segment: NDArray[np.uint8]) -> str:
        """Copies a version to its places. Returns the digest of what then lies there.

        names: each of the version's tensors, by the name that the pieces have for it.
        """
        entries = {names[entry.name]: entry for entry in staged.manifest.tensors}
        for piece in self.pieces:
            source = entries[piece.tensor].offset + piece.start
            segment[piece.place : piece.place + piece.num_bytes] = staged.buffer[
                source : source + piece.num_bytes
            ]
        return self._digest(staged.manifest, names, segment)

    def _digest(self, manifest: Manifest, names: Mapping[str, str], segment: NDArray[np.uint8]) -> str:
        """Gathers the version out of the segment again, a chunk at a time."""
        parts = self._parts(manifest, names, segment)
        digests = []
        chunk = np.zeros(manifest.chunk_bytes, dtype=np.uint8)
        begin, part = next(parts)
        for index in range(num_chunks(manifest.num_bytes, manifest.chunk_bytes)):
            where = manifest.chunk(index)
            chunk[:] = 0
            while begin < where.stop:
                taken = part[: where.stop - begin]
                chunk[begin - where.start : begin - where.start + taken.size] = taken
                if taken.size < part.size:
                    begin, part = begin + taken.size, part[taken.size :]
                else:
                    begin, part = next(parts, (manifest.num_bytes, part))
            digests.append(chunk_digest(chunk[: where.stop - where.start]))
        return table_digest(manifest.tensors, manifest.chunk_bytes, digests)

    def _parts(
        self, manifest: Manifest, names: Mapping[str, str], segment: NDArray[np.uint8]
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(offset in the version, bytes), in the version's order."""
        pieces: dict[str, list[Piece]] = {}
        for piece in sorted(self.pieces, key=lambda piece: piece.start):
            pieces.setdefault(piece.tensor, []).append(piece)
        for entry in manifest.tensors:
            for piece in pieces[names[entry.name]]:
                yield entry.offset + piece.start, segment[piece.place : piece.place + piece.num_bytes]
