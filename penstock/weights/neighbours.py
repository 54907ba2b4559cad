"""Actors of one host: what one of them has fetched over the network, the others need not fetch.

Who fetches a version has the host's turn on it, a lock on a file, which ends with its process. The
others wait for the turn, and find the version in the buffer of the one that had it before: buffers
lie in shared memory, and their headers say what they hold. It is copied from there, and every chunk
is verified like one from the network, since a buffer's owner overwrites it as it likes.

Where shared memory has no room, buffers are the process's own, and every actor fetches for itself.
On the trainer's host nothing is fetched over the network, and buffers take no shared memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.weights.buffer import ChunkBuffer
from penstock.weights.file_locks import try_open_lock
from penstock.weights.manifest import Blob, Manifest, SharedMemoryMedium
from penstock.weights.media.base import Patience
from penstock.weights.segment import (
    OwnedSegment,
    create_segment,
    find_segments,
    open_segment,
    remove_stale,
    segment_folder,
    writer_is_alive,
)

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.01
_DIGITS = 32


class Neighbours:
    """The actors of this host and user, to one of them. Used by one thread at a time."""

    def __init__(self, *, prefix: str | None = None, turn_seconds: float = 60.0) -> None:
        """
        prefix: of the files' names; the same for all who are to find each other.
        turn_seconds: who waits longer for another's fetch fetches for itself.
        """
        self._prefix = prefix or f"penstock-fetched-{os.geteuid()}"
        self._turn_seconds = turn_seconds
        self._buffers: list[_ExposedBuffer] = []
        remove_stale(self._prefix)
        self._remove_stale_turns()

    def make_buffer(self) -> ChunkBuffer:
        """A buffer that the others read when it is whole."""
        buffer = _ExposedBuffer(self._prefix)
        self._buffers.append(buffer)
        return buffer

    @contextlib.contextmanager
    def turn(self, blob: Blob, patience: Patience) -> Iterator[None]:
        """Waits while another actor of this host fetches the same. Raises WeightTransferError."""
        path = self._turn_path(blob.digest)
        file = self._await_turn(path, blob, patience)
        try:
            yield
        finally:
            if file is not None:
                path.unlink(missing_ok=True)
                os.close(file)

    def copy(self, into: ChunkBuffer) -> None:
        """Copies what a neighbour has of what is missing. What does not turn out right stays missing."""
        blob = into.blob
        assert blob is not None
        for path in find_segments(self._prefix):
            if not into.missing():
                return
            try:
                segment = open_segment(SharedMemoryMedium(name=path.name, nonce=""), blob.num_bytes)
            except WeightTransferError as error:
                _log.debug("a neighbour's buffer is passed over: %s", error)
                continue
            if segment.digest == blob.digest:
                for index in into.missing():
                    into.put(index, segment.payload[blob.chunk(index)])

    def close(self) -> None:
        """Removes the files; who has them mapped keeps the bytes."""
        while self._buffers:
            self._buffers.pop().close()

    def _await_turn(self, path: Path, blob: Blob, patience: Patience) -> int | None:
        """The locked file; None if another one has it for too long."""
        until = time.monotonic() + self._turn_seconds
        while (file := try_open_lock(path)) is None:
            if time.monotonic() > until:
                _log.warning(
                    "another actor of this host has fetched version %s for %.0f s; fetching it here too",
                    blob.version, self._turn_seconds,
                )  # fmt: skip
                return None
            patience.check(f"another actor of this host, which fetches version {blob.version}")
            time.sleep(_POLL_SECONDS)
        return file

    def _turn_path(self, digest: str) -> Path:
        return segment_folder() / f"{self._prefix}.{digest[:_DIGITS]}.turn"

    def _remove_stale_turns(self) -> None:
        """Those of actors that were killed in their turn."""
        for path in segment_folder().glob(f"{self._prefix}.*.turn"):
            if (file := try_open_lock(path)) is not None:
                path.unlink(missing_ok=True)
                os.close(file)


def _lies_here(blob: Blob) -> bool:
    media = blob.media if isinstance(blob, Manifest) else ()
    return any(isinstance(medium, SharedMemoryMedium) and writer_is_alive(medium) for medium in media)


class _ExposedBuffer(ChunkBuffer):
    """A buffer in shared memory, labelled with what it holds when that is whole."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self._owned: OwnedSegment | None = None
        self._comes_from_afar = False

    def prepare(self, blob: Blob, other: ChunkBuffer | None = None) -> None:
        self._label(None)
        self._comes_from_afar = not _lies_here(blob)
        super().prepare(blob, other)

    def show(self) -> None:
        if self.blob is not None and not self.missing():
            self._label(self.blob.digest)

    def close(self) -> None:
        owned, self._owned = self._owned, None
        if owned is not None:
            owned.remove()

    def _allocate(self, num_bytes: int) -> NDArray[np.uint8]:
        self.close()
        if not self._comes_from_afar:
            return super()._allocate(num_bytes)
        try:
            self._owned = create_segment(self._prefix, num_bytes, spill=False)
        except WeightTransferError as error:
            _log.warning("other actors of this host will not find what is fetched here: %s", error)
            return super()._allocate(num_bytes)
        return self._owned.segment.payload

    def _label(self, digest: str | None) -> None:
        if self._owned is not None:
            self._owned.segment.set_digest(digest)
