"""Payload segments: append-only files that hold trajectories as they came.

The ledger's rows name a payload's place (segment, offset, length) and its checksum. A
commit that names a place follows the sync of what lies there, so a row never points to
bytes that a crash may take. What no row names is nothing: a tail that was torn off, the
payloads of a commit that never came to be. A start of the ledger begins a segment of its
own and never writes to an older one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from penstock.codec import checksum

FOLDER = "payloads"
"""In the run's folder."""
SEGMENT_BYTES = 64 * 1024 * 1024
"""A segment that has grown to it is not appended to."""
_SUFFIX = ".segment"
_BUFFERS_A_CALL = 1024  # IOV_MAX


class Place(NamedTuple):
    """Where a payload lies, and what it must be."""

    segment: int
    offset: int
    num_bytes: int
    checksum: int


def folder_of(ledger: Path) -> Path:
    return ledger.parent / FOLDER


def path_of(folder: Path, segment: int) -> Path:
    return folder / f"{segment:08d}{_SUFFIX}"


class SegmentWriter:
    """Appends payloads; one at a time in a folder. Every method raises OSError.

    kept: the segments that the ledger knows. All other files of the folder are deleted.
    """

    def __init__(self, folder: Path, kept: Iterable[int], *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        known = set(kept)
        self._number = max(known, default=0)
        self._size = segment_bytes
        self._file: int | None = None
        self._unsynced = False
        for path in folder.glob(f"*{_SUFFIX}"):
            if path.stem.isdecimal() and int(path.stem) not in known:
                path.unlink()

    def append(self, payloads: Sequence[bytes]) -> tuple[int, list[int]]:
        """Writes payloads side by side; the segment, and the offset of each. Not on disk before `sync`."""
        if self._size >= self._segment_bytes:
            self._begin_segment()
        assert self._file is not None
        offsets = []
        for payload in payloads:
            offsets.append(self._size)
            self._size += len(payload)
        self._unsynced = True
        for start in range(0, len(payloads), _BUFFERS_A_CALL):
            _write_all(self._file, payloads[start : start + _BUFFERS_A_CALL])
        # Linux begins to write out what is so advised, and keeps it, for it is not clean yet: the disk works while
        # the rows are written, and `sync` waits for the rest. Of 16 ms for 4.8 MB that leaves 13.
        os.posix_fadvise(self._file, offsets[0], self._size - offsets[0], os.POSIX_FADV_DONTNEED)
        return self._number, offsets

    def sync(self) -> None:
        """Returns once all that was appended is on disk."""
        if self._unsynced:
            assert self._file is not None
            os.fdatasync(self._file)
            self._unsynced = False

    def delete(self, segments: Iterable[int]) -> None:
        """Removes segments that no row of the ledger, as it is on disk, names."""
        for segment in segments:
            path_of(self._folder, segment).unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _begin_segment(self) -> None:
        self.sync()
        self.close()
        if not self._folder.exists():
            self._folder.mkdir(mode=0o700)
            _sync_folder(self._folder.parent)
        self._number += 1
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        self._file = os.open(path_of(self._folder, self._number), flags, 0o600)
        _sync_folder(self._folder)
        self._size = 0


def read(folder: Path, places: Iterable[Place]) -> Iterator[bytes | None]:
    """The payloads at some places, in order; None where the disk has others than were written, or none."""
    with contextlib.ExitStack() as files:
        opened: dict[int, int | None] = {}
        for place in places:
            if place.segment not in opened:
                opened[place.segment] = _open(path_of(folder, place.segment), files)
            file = opened[place.segment]
            payload = b"" if file is None else os.pread(file, place.num_bytes, place.offset)
            yield payload if checksum(payload) == place.checksum else None


def _open(path: Path, files: contextlib.ExitStack) -> int | None:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    files.callback(os.close, file)
    return file


def _write_all(file: int, payloads: Sequence[bytes]) -> None:
    """One call, but where the disk took a part of it only: then the rest, or the reason."""
    written = os.writev(file, payloads)
    if written == sum(map(len, payloads)):
        return
    rest = memoryview(b"".join(payloads))[written:]
    while rest:
        rest = rest[os.write(file, rest) :]


def _sync_folder(folder: Path) -> None:
    """Makes the names of its files durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
