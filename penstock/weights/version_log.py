"""The learner's versions: the newest ones whole, and a log of deltas that lead to the newest.

The log serves actors on other hosts: who holds a recent version fetches the deltas since, and
who holds none fetches the snapshot, a version that stays for SNAPSHOT_EVERY publications, and
the deltas after it. So a slow joiner is never overtaken. Deltas lie in shared-memory segments
as versions do, for the coordinator to serve. They are made only where somebody wants them.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.buffer import num_threads
from penstock.weights.manifest import (
    CHUNK_BYTES,
    Delta,
    HostTensor,
    Manifest,
    SharedMemoryMedium,
    Snapshot,
    chunk_digest,
    delta_digest,
    num_chunks,
)
from penstock.weights.segment import NONCE_BYTES, OwnedSegment, SegmentRing, Written, create_segment

SNAPSHOT_EVERY = 16
"""Publications between snapshots."""
KEPT_DELTAS = 40
DELTA_PARTS = 16
"""A delta's chunks, while they are neither too small nor larger than a version's: a receiver that needs several
deltas asks for their parts of the same tensors together, and the first such parts, and the last, take time alone."""
MIN_DELTA_CHUNK_BYTES = 128 * 1024
"""A chunk costs processor time at both ends, however small it is, and 32 bytes of each manifest."""

_log = logging.getLogger(__name__)


class VersionLog:
    """A ring of segments, and the deltas between what was written to it."""

    def __init__(
        self,
        *,
        name_prefix: str,
        num_segments: int = 4,
        chunk_bytes: int = CHUNK_BYTES,
        snapshot_every: int = SNAPSHOT_EVERY,
    ) -> None:
        self._prefix = name_prefix
        self._chunk_bytes = chunk_bytes
        self._snapshot_every = snapshot_every
        self._ring = SegmentRing(name_prefix=name_prefix, num_segments=num_segments, chunk_bytes=chunk_bytes)
        self._deltas: list[_Logged] = []
        self._snapshot: Snapshot | None = None
        self._since_snapshot = 0

    def write(
        self, version: PolicyVersion, tensors: Sequence[HostTensor], *, with_delta: bool = False
    ) -> Manifest:
        """Writes a version; with_delta: and what leads to it. Raises WeightTransferError when there is no room."""
        before = self._ring.newest
        manifest = self._ring.write(version, tensors)
        if not with_delta:
            self._forget()
            return manifest
        return self._with_ways(before, manifest, self._difference(before))

    def write_delta(self, version: PolicyVersion, delta: NDArray[np.uint8]) -> Manifest:
        """Makes a version of the newest one. Raises WeightTransferError; then no version was written."""
        from penstock.weights.delta import apply_all

        before = self._ring.newest
        assert before is not None

        def fill(payload: NDArray[np.uint8]) -> None:
            payload[:] = before.payload
            apply_all([delta], payload, num_threads=num_threads())

        old = before.manifest
        manifest = self._ring.fill(version, old.tensors, old.num_bytes, fill)
        return self._with_ways(before, manifest, delta)

    def close(self) -> None:
        """Removes the files; who has them mapped keeps the bytes. May be called twice."""
        self._forget()
        self._ring.close()

    def _difference(self, before: Written | None) -> NDArray[np.uint8] | None:
        """The delta to the newest version; None if other tensors were written before."""
        newest = self._ring.newest
        if before is None or newest is None or before.manifest.tensors != newest.manifest.tensors:
            return None
        from penstock.weights.delta import encode_version

        delta = encode_version(newest.manifest.tensors, before.payload, newest.payload)
        return np.frombuffer(delta, dtype=np.uint8)

    def _with_ways(
        self, before: Written | None, manifest: Manifest, delta: NDArray[np.uint8] | None
    ) -> Manifest:
        """Logs a version's delta, and tells the ways to it in its manifest."""
        if before is None or delta is None or delta.size > manifest.num_bytes // 2:
            self._forget()
        elif delta.size:
            self._append(before.manifest, manifest, delta)
        self._since_snapshot += 1
        if self._needs_snapshot(manifest):
            self._take_snapshot(manifest)
        deltas = tuple(each.delta for each in self._deltas)
        return dataclasses.replace(manifest, deltas=deltas, snapshot=self._snapshot)

    def _append(self, before: Manifest, manifest: Manifest, data: NDArray[np.uint8]) -> None:
        try:
            logged = _log_delta(self._prefix, before, manifest, data)
        except WeightTransferError as error:
            _log.warning("version %s has no delta: %s", manifest.version, error)
            self._forget()
            return
        self._deltas.append(logged)
        while (
            len(self._deltas) > KEPT_DELTAS
            or sum(each.delta.num_bytes for each in self._deltas) > manifest.num_bytes // 2
        ):
            self._deltas.pop(0).segment.remove()

    def _needs_snapshot(self, manifest: Manifest) -> bool:
        """Whether the snapshot is old, or no delta leads from it any more."""
        if self._snapshot is None or self._since_snapshot >= self._snapshot_every:
            return True
        known = {each.delta.base for each in self._deltas} | {manifest.digest}
        return self._snapshot.digest not in known

    def _take_snapshot(self, manifest: Manifest) -> None:
        self._ring.keep_newest()
        (segment,) = manifest.media
        assert isinstance(segment, SharedMemoryMedium)
        self._snapshot = Snapshot(
            version=manifest.version,
            num_bytes=manifest.num_bytes,
            chunk_bytes=manifest.chunk_bytes,
            chunk_digests=manifest.chunk_digests,
            digest=manifest.digest,
            segment=segment,
        )
        self._since_snapshot = 0

    def _forget(self) -> None:
        """No delta leads to the versions that follow."""
        while self._deltas:
            self._deltas.pop().segment.remove()
        self._snapshot = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Logged:
    delta: Delta
    segment: OwnedSegment


def _chunk_bytes(num_bytes: int, *, at_most: int) -> int:
    """MIN_DELTA_CHUNK_BYTES, doubled until no more than DELTA_PARTS are needed."""
    size = MIN_DELTA_CHUNK_BYTES
    while size * DELTA_PARTS < num_bytes:
        size *= 2
    return min(size, at_most)


def _log_delta(prefix: str, before: Manifest, manifest: Manifest, data: NDArray[np.uint8]) -> _Logged:
    """Writes a delta to a segment of its own. Raises WeightTransferError when there is no room."""
    owned = create_segment(prefix, data.size)
    owned.segment.payload[: data.size] = data
    nonce = secrets.token_bytes(NONCE_BYTES)
    owned.segment.set_nonce(nonce)
    size = _chunk_bytes(data.size, at_most=manifest.chunk_bytes)
    digests = tuple(
        chunk_digest(data[index * size : (index + 1) * size]) for index in range(num_chunks(data.size, size))
    )
    delta = Delta(
        version=manifest.version,
        num_bytes=data.size,
        chunk_bytes=size,
        chunk_digests=digests,
        digest=delta_digest(before.digest, manifest.digest, size, digests),
        base=before.digest,
        result=manifest.digest,
        segment=SharedMemoryMedium(name=owned.segment.name, nonce=nonce.hex()),
    )
    return _Logged(delta=delta, segment=owned)
