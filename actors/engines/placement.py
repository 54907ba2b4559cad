"""Where the bytes of a checkpoint go in a segment that another process reads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from penstock.weights.manifest import Manifest, TensorEntry, num_chunks, table_digest
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

        names: each of the version's tensors, by the name that the pieces have for it. A chunk is
        digested as soon as it is copied, while the processor's cache has it.
        """
        manifest = staged.manifest
        digests = []
        for parts in self._chunks(manifest, names):
            hasher = blake3()
            for part in parts:
                if part.place is None:
                    hasher.update(bytes(part.num_bytes))
                    continue
                copy = segment[part.place : part.place + part.num_bytes]
                copy[:] = staged.buffer[part.offset : part.offset + part.num_bytes]
                hasher.update(copy.data)
            digests.append(hasher.digest())
        return table_digest(manifest.tensors, manifest.chunk_bytes, digests)

    def _chunks(self, manifest: Manifest, names: Mapping[str, str]) -> Iterator[list[_Part]]:
        """What each of the manifest's chunks consists of."""
        parts = self._parts(manifest, names)
        rest: _Part | None = None
        for index in range(num_chunks(manifest.num_bytes, manifest.chunk_bytes)):
            end = manifest.chunk(index).stop
            chunk: list[_Part] = []
            while (part := rest or next(parts, None)) is not None and part.offset < end:
                taken, rest = part.cut(end - part.offset)
                chunk.append(taken)
            rest = part
            yield chunk

    def _parts(self, manifest: Manifest, names: Mapping[str, str]) -> Iterator[_Part]:
        """The version's bytes in order, gaps between tensors included."""
        pieces: dict[str, list[Piece]] = {}
        for piece in sorted(self.pieces, key=lambda piece: piece.start):
            pieces.setdefault(piece.tensor, []).append(piece)
        end = 0
        for entry in manifest.tensors:
            if entry.offset > end:
                yield _Part(offset=end, place=None, num_bytes=entry.offset - end)
            for piece in pieces[names[entry.name]]:
                yield _Part(offset=entry.offset + piece.start, place=piece.place, num_bytes=piece.num_bytes)
            end = entry.offset + entry.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Bytes of a version that lie together."""

    offset: int
    """In the version."""
    place: int | None
    """In the segment; None for zeros, which it does not hold."""
    num_bytes: int

    def cut(self, num_bytes: int) -> tuple[_Part, _Part | None]:
        """The first bytes, and the rest if there is one."""
        if num_bytes >= self.num_bytes:
            return self, None
        place = None if self.place is None else self.place + num_bytes
        rest = _Part(offset=self.offset + num_bytes, place=place, num_bytes=self.num_bytes - num_bytes)
        return _Part(offset=self.offset, place=self.place, num_bytes=num_bytes), rest
