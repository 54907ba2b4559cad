"""Brings a version to this process: whole and verified, or not at all.

Two buffers take turns: what was fetched last stays intact while the next version is
staged in the other. A chunk that either buffer holds already is not fetched again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.weights.manifest import Manifest, Medium, verify_chunk
from penstock.weights.media.base import Patience, WeightReceiver
from penstock.weights.media.shared_memory import SharedMemoryReceiver
from penstock.weights.media.zeromq import ZeromqReceiver
from penstock.weights.staged import StagedWeights

_log = logging.getLogger(__name__)

_ATTEMPTS_PER_MEDIUM = 2


class WeightFetcher:
    """Fetches versions one after another. Blocks: call it in a thread.

    What `fetch` returned stays intact until the fetch after the next one.
    """

    def __init__(self, receivers: Sequence[WeightReceiver] | None = None) -> None:
        """receivers: one a medium; without them, shared memory and ZeroMQ."""
        given = (SharedMemoryReceiver(), ZeromqReceiver()) if receivers is None else receivers
        self._receivers: dict[type[Medium], WeightReceiver] = {
            receiver.medium: receiver for receiver in given
        }
        self._newest = _Buffer()
        self._spare = _Buffer()

    def fetch(
        self, manifest: Manifest, *, timeout_seconds: float, abandoned: threading.Event | None = None
    ) -> StagedWeights:
        """Tries the manifest's media in order, for the chunks that are not here already.

        abandoned: set when the version is wanted no more; ends the fetch early.
        Raises WeightTransferError; then what was fetched before is unchanged.
        """
        patience = Patience(
            deadline=time.monotonic() + timeout_seconds, abandoned=abandoned or threading.Event()
        )
        staging = self._spare
        staging.prepare(manifest, self._newest)
        self._fetch_missing(manifest, staging, patience)
        self._newest, self._spare = staging, self._newest
        return StagedWeights(manifest=manifest, buffer=staging.packed())

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.close()

    def _fetch_missing(self, manifest: Manifest, staging: _Buffer, patience: Patience) -> None:
        failures: list[str] = []
        for medium in manifest.media:
            if not staging.missing():
                return
            receiver = self._receivers.get(type(medium))
            if receiver is None:
                continue
            try:
                _fetch_over(receiver, medium, manifest, staging, patience)
            except WeightTransferError as error:
                patience.check(f"version {manifest.version}")
                failures.append(f"{type(medium).__name__}: {error}")
                _log.warning("version %s over %s: %s", manifest.version, type(medium).__name__, error)
        if staging.missing():
            raise WeightTransferError(
                f"version {manifest.version}: {len(staging.missing())} of {len(manifest.chunk_digests)} chunks "
                f"did not arrive: {'; '.join(failures) or 'no medium of it is known here'}"
            )


def _fetch_over(
    receiver: WeightReceiver, medium: Medium, manifest: Manifest, staging: _Buffer, patience: Patience
) -> None:
    """Asks twice: a chunk that the trainer overwrote as it was read is corrupt, then gone."""
    for _ in range(_ATTEMPTS_PER_MEDIUM):
        missing = staging.missing()
        for index, data in receiver.chunks(manifest, medium, missing, patience):
            staging.put(index, data)
        if not staging.missing():
            return
    raise WeightTransferError(
        f"{len(staging.missing())} chunks arrived with another digest than the manifest's"
    )


class _Buffer:
    """One version's bytes, and which of its chunks are verified to be there."""

    def __init__(self) -> None:
        self._data: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._manifest: Manifest | None = None
        self._present: list[bool] = []

    def prepare(self, manifest: Manifest, other: _Buffer) -> None:
        """Makes room for a version, keeping or copying the chunks that are held already."""
        kept = self._held_at_same_place(manifest)
        if self._data.size < manifest.num_bytes:
            self._data = np.zeros(manifest.num_bytes, dtype=np.uint8)
            kept = set()
        elsewhere = other.chunks_by_digest()
        present = [index in kept for index in range(len(manifest.chunk_digests))]
        for index, digest in enumerate(manifest.chunk_digests):
            source = None if present[index] else elsewhere.get(digest)
            where = manifest.chunk(index)
            if source is not None and source.size == where.stop - where.start:
                self._data[where] = source
                present[index] = True
        self._manifest, self._present = manifest, present

    def missing(self) -> list[int]:
        return [index for index, present in enumerate(self._present) if not present]

    def put(self, index: int, data: NDArray[np.uint8]) -> None:
        """Copies a chunk in, then verifies the copy."""
        assert self._manifest is not None
        where = self._manifest.chunk(index)
        if data.size != where.stop - where.start:
            return
        self._data[where] = data
        self._present[index] = verify_chunk(self._manifest, index, self._data[where])

    def chunks_by_digest(self) -> dict[bytes, NDArray[np.uint8]]:
        if self._manifest is None:
            return {}
        return {
            digest: self._data[self._manifest.chunk(index)]
            for index, digest in enumerate(self._manifest.chunk_digests)
            if self._present[index]
        }

    def packed(self) -> NDArray[np.uint8]:
        assert self._manifest is not None
        return self._data[: self._manifest.num_bytes]

    def _held_at_same_place(self, manifest: Manifest) -> set[int]:
        """Chunks that this buffer holds where the new version wants them, in chunks of the same size."""
        old = self._manifest
        if old is None or old.chunk_bytes != manifest.chunk_bytes:
            return set()
        pairs: Iterable[tuple[bytes, bytes]] = zip(old.chunk_digests, manifest.chunk_digests, strict=False)
        return {
            index
            for index, (held, wanted) in enumerate(pairs)
            if held == wanted and self._present[index] and old.chunk(index) == manifest.chunk(index)
        }
