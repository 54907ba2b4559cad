"""Chunks from the trainer's own segment, for receivers on the same host."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.weights.manifest import Blob, Medium, SharedMemoryMedium
from penstock.weights.media.base import Chunk, Patience
from penstock.weights.segment import Segment, open_segment, segment_path


class SharedMemoryReceiver:
    """Keeps what it mapped: the ring's few segments come back again and again, as long as their files are there."""

    def __init__(self, *, num_segments: int = 8) -> None:
        self._num_segments = num_segments
        self._mapped: dict[str, Segment] = {}

    @property
    def medium(self) -> type[Medium]:
        return SharedMemoryMedium

    def chunks(
        self, blob: Blob, medium: Medium, indices: Sequence[int], patience: Patience
    ) -> Generator[Chunk, None, None]:
        assert isinstance(medium, SharedMemoryMedium)
        segment = self._map(medium, blob.num_bytes)
        payload = segment.payload
        for index in indices:
            patience.check("shared memory")
            _check_nonce(segment, medium, blob)
            yield index, payload[blob.chunk(index)]
        _check_nonce(segment, medium, blob)

    def in_place(self, blob: Blob, medium: SharedMemoryMedium) -> NDArray[np.uint8]:
        """[num_bytes] uint8, the trainer's own: it may hold another version at any time."""
        segment = self._map(medium, blob.num_bytes)
        _check_nonce(segment, medium, blob)
        return segment.payload[: blob.num_bytes]

    def close(self) -> None:
        self._mapped.clear()

    def _map(self, medium: SharedMemoryMedium, num_bytes: int) -> Segment:
        segment = self._mapped.get(medium.name)
        if segment is None or segment.capacity < num_bytes:
            segment = open_segment(medium, num_bytes)
            for name in [name for name in self._mapped if segment_path(name) is None]:
                del self._mapped[name]
            if len(self._mapped) >= self._num_segments:
                self._mapped.pop(next(iter(self._mapped)))
            self._mapped[medium.name] = segment
        return segment


def _check_nonce(segment: Segment, medium: SharedMemoryMedium, blob: Blob) -> None:
    if segment.nonce != medium.nonce:
        raise WeightTransferError(
            f"segment {medium.name} does not hold version {blob.version} (any more): its nonce is "
            f"{segment.nonce}, expected {medium.nonce}; fetch a newer version"
        )
