"""Versions in an engine's own layout, in memory that the actors of one host share.

Each version is prepared once a host, by whichever actor comes first; the others find it
and take it. Segments are reused, since writing to fresh pages is ten times slower.

Locks on files say who does what, and end with their process:

    PREFIX.members    shared by every actor of this layout; the last one removes the files
    PREFIX.writer     held by the one that prepares a version
    PREFIX.<segment>  shared by those who hold its version; who writes has it alone

A segment's header has the digest of what lies in it; it is empty while it is written to.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.weights.file_locks import open_lock, try_lock
from penstock.weights.media.base import Patience
from penstock.weights.segment import (
    OwnedSegment,
    adopt_segment,
    create_segment,
    find_segments,
    segment_folder,
)

_POLL_SECONDS = 0.005


def prefix_of(layout: str) -> str:
    """What the names of a layout's files begin with; each user has files of his own."""
    return f"penstock-engine-{os.geteuid()}-{layout}"


class HostRing:
    """The segments of one layout. Blocks: call it in a thread, one call at a time."""

    def __init__(self, *, layout: str, num_bytes: int) -> None:
        """layout: the same for all engines that read the same bytes in the same places."""
        remove_abandoned()
        self._prefix = prefix_of(layout)
        self._num_bytes = num_bytes
        self._members = open_lock(segment_folder() / f"{self._prefix}.members", fcntl.LOCK_SH)
        self._writer = open_lock(segment_folder() / f"{self._prefix}.writer", fcntl.LOCK_UN)
        self._segments: dict[str, OwnedSegment] = {}
        self._held: Counter[str] = Counter()

    def hold(
        self,
        digest: str,
        write: Callable[[NDArray[np.uint8]], str],
        *,
        timeout_seconds: float,
        abandoned: threading.Event | None = None,
    ) -> str:
        """Takes the version of that digest, or prepares it. Returns its segment's name.

        write: writes the version to a segment's payload; returns the digest of what then lies there.
        The segment keeps the version until `release`. Raises WeightTransferError; then what was held
        before is unchanged.
        """
        patience = Patience(
            deadline=time.monotonic() + timeout_seconds, abandoned=abandoned or threading.Event()
        )
        while (name := self._find(digest)) is None:
            if try_lock(self._writer, fcntl.LOCK_EX):
                try:
                    name = self._find(digest) or self._prepare(digest, write)
                finally:
                    fcntl.flock(self._writer, fcntl.LOCK_UN)
                break
            patience.check("another actor of this host, which prepares weights")
            time.sleep(_POLL_SECONDS)
        self._held[name] += 1
        return name

    def release(self, name: str) -> None:
        """Ends one `hold`: others may write to the segment when all have ended."""
        self._held[name] -= 1
        if not self._held[name]:
            fcntl.flock(self._segments[name].file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Leaves; the last one to leave removes the files. Who has them mapped keeps the bytes."""
        while self._segments:
            self._segments.popitem()[1].close()
        _remove_if_alone(self._prefix, self._members)
        os.close(self._writer)
        os.close(self._members)

    def _find(self, digest: str) -> str | None:
        for name, owned in self._present():
            if owned.segment.digest == digest and (self._held[name] or try_lock(owned.file, fcntl.LOCK_SH)):
                if owned.segment.digest == digest:
                    return name
                fcntl.flock(owned.file, fcntl.LOCK_UN)
        return None

    def _prepare(self, digest: str, write: Callable[[NDArray[np.uint8]], str]) -> str:
        owned = self._free()
        try:
            owned.segment.set_digest(None)
            written = write(owned.segment.payload[: self._num_bytes])
            if written != digest:
                raise WeightTransferError(
                    f"the engine's segment has digest {written}, the version {digest}; nothing was installed"
                )
            owned.segment.set_digest(digest)
        except BaseException:
            fcntl.flock(owned.file, fcntl.LOCK_UN)
            raise
        fcntl.flock(owned.file, fcntl.LOCK_SH)
        return owned.segment.name

    def _free(self) -> OwnedSegment:
        """A segment that nobody holds, locked for writing; a new one if there is none."""
        for name, owned in self._present():
            if not self._held[name] and try_lock(owned.file, fcntl.LOCK_EX):
                return owned
        owned = create_segment(self._prefix, self._num_bytes)
        self._segments[owned.segment.name] = owned
        return owned

    def _present(self) -> list[tuple[str, OwnedSegment]]:
        for path in find_segments(self._prefix):
            if path.name not in self._segments and (owned := adopt_segment(path, self._num_bytes)):
                self._segments[path.name] = owned
        return list(self._segments.items())


def remove_abandoned() -> None:
    """Removes the segments of actors that were killed, whatever their layout."""
    for path in segment_folder().glob(f"{prefix_of('*')}.members"):
        with contextlib.suppress(FileNotFoundError):
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                _remove_if_alone(path.name.removesuffix(".members"), file)
            finally:
                os.close(file)


def _remove_if_alone(prefix: str, members: int) -> None:
    """Removes a layout's files, unless another actor uses them, or has removed them already."""
    if not try_lock(members, fcntl.LOCK_EX) or not os.fstat(members).st_nlink:
        return
    for path in find_segments(prefix):
        path.unlink(missing_ok=True)
    for kind in ("writer", "members"):
        (segment_folder() / f"{prefix}.{kind}").unlink(missing_ok=True)
