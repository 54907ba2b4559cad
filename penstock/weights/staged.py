"""A version that waits to be installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import (
    CHUNK_BYTES,
    HostTensor,
    Manifest,
    chunk_digest,
    num_chunks,
    pack,
    plan_layout,
    table_digest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedWeights:
    manifest: Manifest
    buffer: NDArray[np.uint8]
    """[num_bytes] uint8: the packed tensors, at the manifest's offsets. Not to be written to."""
    verified: bool = True
    """Whether every chunk's digest was checked. If not, this is the trainer's own memory, which may come
    to hold another version at any time: whoever copies it checks the copy."""


def stage(version: PolicyVersion, tensors: Sequence[HostTensor]) -> StagedWeights:
    """Stages tensors of this process, which nothing has to be fetched for."""
    entries, num_bytes = plan_layout(tensors)
    buffer = np.empty(num_bytes, dtype=np.uint8)
    pack(buffer, entries, tensors)
    digests = tuple(
        chunk_digest(buffer[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        for index in range(num_chunks(num_bytes, CHUNK_BYTES))
    )
    manifest = Manifest(
        version=version,
        tensors=entries,
        num_bytes=num_bytes,
        chunk_bytes=CHUNK_BYTES,
        chunk_digests=digests,
        digest=table_digest(entries, CHUNK_BYTES, digests),
    )
    return StagedWeights(manifest=manifest, buffer=buffer)
