"""The learner's versions of a run that trains adapters: one base, and the newest versions made of it.

Actors of this host map a version whole, as they do without adapters. Actors of other hosts
fetch the base once, and then the factors of each version, from which they make it.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.trajectory import PolicyVersion
from penstock.weights.adapters import LowRank, merge, pack_factors
from penstock.weights.manifest import (
    CHUNK_BYTES,
    AdapterUpdate,
    HostTensor,
    Manifest,
    SharedMemoryMedium,
    Snapshot,
    TensorEntry,
    adapter_digest,
    chunk_digest,
    num_chunks,
    pack,
    plan_layout,
    table_digest,
)
from penstock.weights.segment import NONCE_BYTES, OwnedSegment, SegmentRing, create_segment

_NUM_SEGMENTS = 3
"""Of whole versions, beside the base."""
_KEPT_FACTORS = 4


class AdaptedLog:
    """A segment with the base, a ring of versions, and a segment of factors for each of those."""

    def __init__(self, *, name_prefix: str, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._prefix = name_prefix
        self._chunk_bytes = chunk_bytes
        self._ring = SegmentRing(name_prefix=name_prefix, num_segments=_NUM_SEGMENTS, chunk_bytes=chunk_bytes)
        self._entries: tuple[TensorEntry, ...] = ()
        self._base: _Written | None = None
        self._factors: deque[OwnedSegment] = deque()

    def write_base(self, version: PolicyVersion, tensors: Sequence[HostTensor]) -> None:
        """Writes what factors are added to. Raises WeightTransferError when there is no room."""
        self._entries, num_bytes = plan_layout(tensors)
        data = np.empty(num_bytes, dtype=np.uint8)
        pack(data, self._entries, tensors)
        self._base = _write_segment(self._prefix, version, data, self._chunk_bytes)

    def write(self, version: PolicyVersion, parts: Sequence[LowRank]) -> Manifest:
        """Makes a version of the base. Raises WeightTransferError when there is no room."""
        base = self._base
        assert base is not None
        payload = base.owned.segment.payload[: base.num_bytes]
        manifest = self._ring.fill(
            version, self._entries, base.num_bytes, lambda out: merge(payload, self._entries, parts, out)
        )
        written = _write_segment(self._prefix, version, pack_factors(parts), self._chunk_bytes)
        self._factors.append(written.owned)
        while len(self._factors) > _KEPT_FACTORS:
            self._factors.popleft().remove()
        return dataclasses.replace(manifest, adapter=self._update(base, written, manifest, parts))

    def close(self) -> None:
        """Removes the files; who has them mapped keeps the bytes. May be called twice."""
        if self._base is not None:
            self._base.owned.remove()
            self._base = None
        while self._factors:
            self._factors.pop().remove()
        self._ring.close()

    def _update(
        self, base: _Written, written: _Written, manifest: Manifest, parts: Sequence[LowRank]
    ) -> AdapterUpdate:
        snapshot = Snapshot(
            version=base.version,
            num_bytes=base.num_bytes,
            chunk_bytes=self._chunk_bytes,
            chunk_digests=base.chunk_digests,
            digest=table_digest(self._entries, self._chunk_bytes, base.chunk_digests),
            segment=base.medium,
        )
        factors = tuple(part.factor for part in parts)
        return AdapterUpdate(
            version=manifest.version,
            num_bytes=written.num_bytes,
            chunk_bytes=self._chunk_bytes,
            chunk_digests=written.chunk_digests,
            digest=adapter_digest(snapshot.digest, manifest.digest, factors, written.chunk_digests),
            base=snapshot,
            factors=factors,
            segment=written.medium,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """Bytes in a segment of their own."""

    version: PolicyVersion
    owned: OwnedSegment
    num_bytes: int
    chunk_digests: tuple[bytes, ...]
    medium: SharedMemoryMedium


def _write_segment(
    prefix: str, version: PolicyVersion, data: NDArray[np.uint8], chunk_bytes: int
) -> _Written:
    """Raises WeightTransferError when there is no room."""
    owned = create_segment(prefix, data.size)
    owned.segment.payload[: data.size] = data
    nonce = secrets.token_bytes(NONCE_BYTES)
    owned.segment.set_nonce(nonce)
    return _Written(
        version=version,
        owned=owned,
        num_bytes=data.size,
        chunk_digests=tuple(
            chunk_digest(data[index * chunk_bytes : (index + 1) * chunk_bytes])
            for index in range(num_chunks(data.size, chunk_bytes))
        ),
        medium=SharedMemoryMedium(name=owned.segment.name, nonce=nonce.hex()),
    )
