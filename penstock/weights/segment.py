"""Memory that trainer, coordinator and actors of one host share: files, mapped.

A segment is a file of 64 bytes of header, then one version's packed tensors. The
header's first 16 bytes are the nonce. The writer sets it to zero, writes the tensors,
then sets it to a random value that the manifest repeats; so a reader that finds the
manifest's nonce before *and* after it read knows that nobody wrote in between. (It
verifies digests as well.) The next 32 bytes are a digest of the content, which engines
name it by (actors/engines/host_ring.py), and the next 8 count the bytes that have arrived
so far where a version is received (penstock/broadcast).

Plain files rather than multiprocessing.shared_memory, whose resource tracker unlinks
what other processes still use. They are allocated once and then reused: writing to
fresh pages is ten times slower than to warm ones.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ConfigError, WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    HostTensor,
    Manifest,
    SharedMemoryMedium,
    TensorEntry,
    chunk_digest,
    num_chunks,
    pack,
    plan_layout,
    table_digest,
)

HEADER_BYTES = 64
NONCE_BYTES = 16
_DIGEST = slice(NONCE_BYTES, NONCE_BYTES + DIGEST_BYTES)
_NUM_ARRIVED = slice(_DIGEST.stop, _DIGEST.stop + 8)

_log = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_RUN = "penstock-run-"
_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\.[0-9a-f]{16}")
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_PROBE_BYTES = 4096
_ABANDONED_SECONDS = 600.0


class Segment:
    """One mapped file. Unmapped when nothing refers to its bytes any more."""

    def __init__(self, mapping: mmap.mmap, name: str) -> None:
        self.name = name
        self._bytes: NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8)

    @property
    def nonce(self) -> str:
        """Hexadecimal; zeros while the segment is being written."""
        return self._bytes[:NONCE_BYTES].tobytes().hex()

    @property
    def digest(self) -> str | None:
        """Hexadecimal; None if nobody has said what the segment holds."""
        digest = self._bytes[_DIGEST].tobytes()
        return digest.hex() if any(digest) else None

    @property
    def num_arrived(self) -> int:
        """Bytes that are there, where a version is still arriving."""
        return int(self._bytes[_NUM_ARRIVED].view("<u8")[0])

    @property
    def capacity(self) -> int:
        return self._bytes.size - HEADER_BYTES

    @property
    def payload(self) -> NDArray[np.uint8]:
        """[capacity] uint8, in place; writable only in the process that created the segment."""
        return self._bytes[HEADER_BYTES:]

    def set_nonce(self, nonce: bytes) -> None:
        self._bytes[:NONCE_BYTES] = np.frombuffer(nonce, dtype=np.uint8)

    def set_num_arrived(self, num_bytes: int) -> None:
        self._bytes[_NUM_ARRIVED].view("<u8")[0] = num_bytes

    def set_digest(self, digest: str | None) -> None:
        raw = bytes(DIGEST_BYTES) if digest is None else bytes.fromhex(digest)
        self._bytes[_DIGEST] = np.frombuffer(raw, dtype=np.uint8)


def open_segment(medium: SharedMemoryMedium, num_bytes: int) -> Segment:
    """Maps a segment of this host for reading. Raises WeightTransferError.

    It may have been overwritten since, or be another host's: compare `nonce`.
    """
    if not _NAME.fullmatch(medium.name):
        raise WeightTransferError(
            f"{medium.name!r} is not a segment's name; expected PREFIX.16 hexadecimal digits"
        )
    path = segment_path(medium.name)
    if path is None:
        raise WeightTransferError(f"segment {medium.name} is not on this host, or its trainer is gone")
    try:
        file = os.open(path, _READ)
    except OSError as error:
        raise WeightTransferError(f"segment {path} cannot be opened: {error}") from error
    try:
        return Segment(_map_for_reading(file, num_bytes), medium.name)
    finally:
        os.close(file)


def segment_path(name: str) -> Path | None:
    """Where a segment of this host lies; None if there is none of that name."""
    paths = (directory / name for directory in _directories())
    return next((path for path in paths if os.path.lexists(path)), None)


def writer_is_alive(medium: SharedMemoryMedium) -> bool:
    """Whether a segment is on this host and the process that made it still runs."""
    path = segment_path(medium.name) if _NAME.fullmatch(medium.name) else None
    return path is not None and not _is_abandoned(path)


def _map_for_reading(file: int, num_bytes: int) -> mmap.mmap:
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_size < HEADER_BYTES + num_bytes:
        raise WeightTransferError(
            f"segment has {status.st_size} bytes; expected a file of at least {HEADER_BYTES + num_bytes}"
        )
    return mmap.mmap(file, 0, prot=mmap.PROT_READ)


class SegmentRing:
    """The trainer's side: the newest versions, each in a segment of its own, reused in turn.

    Segments lie in /dev/shm or, if that has no room, in the folder for temporary files.
    What dead writers left behind is removed at the start: files of the same prefix, and those
    of other runs once they are ten minutes old. A lock that ends with its process tells who is alive.
    """

    def __init__(self, *, name_prefix: str, num_segments: int = 4, chunk_bytes: int = CHUNK_BYTES) -> None:
        if not _PREFIX.fullmatch(name_prefix):
            raise ConfigError(
                f"{name_prefix!r} cannot begin a file's name; expected letters, digits, - and _"
            )
        if num_segments < 2:
            raise ConfigError(
                f"num_segments is {num_segments}; expected at least 2, since readers lag behind"
            )
        self._prefix = name_prefix
        self._num_segments = num_segments
        self._chunk_bytes = chunk_bytes
        self._segments: list[OwnedSegment] = []
        """The longest written first."""
        self._kept: OwnedSegment | None = None
        self.newest: Written | None = None
        remove_stale(name_prefix)

    def write(self, version: PolicyVersion, tensors: Sequence[HostTensor]) -> Manifest:
        """Packs a version into the oldest segment, and describes it.

        Chunks that are equal to the newest version's are not hashed again. Raises
        WeightTransferError when there is no room anywhere.
        """
        entries, num_bytes = plan_layout(tensors)
        return self.fill(version, entries, num_bytes, lambda payload: pack(payload, entries, tensors))

    def fill(
        self,
        version: PolicyVersion,
        entries: tuple[TensorEntry, ...],
        num_bytes: int,
        write: Callable[[NDArray[np.uint8]], None],
    ) -> Manifest:
        """Has a version written into the oldest segment, and describes it.

        write: fills [num_bytes] uint8 with the packed tensors. If it raises, no version has that segment.
        """
        segment = self._oldest(num_bytes).segment
        segment.set_nonce(bytes(NONCE_BYTES))
        payload = segment.payload[:num_bytes]
        write(payload)
        digests = self._digests(payload)
        nonce = secrets.token_bytes(NONCE_BYTES)
        segment.set_nonce(nonce)
        manifest = Manifest(
            version=version,
            tensors=entries,
            num_bytes=num_bytes,
            chunk_bytes=self._chunk_bytes,
            chunk_digests=digests,
            digest=table_digest(entries, self._chunk_bytes, digests),
            media=(SharedMemoryMedium(name=segment.name, nonce=nonce.hex()),),
        )
        self.newest = Written(manifest, payload)
        return manifest

    def keep_newest(self) -> None:
        """The newest version's segment is not reused until another one is kept."""
        assert self._num_segments > 2, "one to keep, the newest, and one to write to"
        self._kept = self._segments[-1]

    def close(self) -> None:
        """Removes the files; who has them mapped keeps the bytes. May be called twice."""
        self.newest = None
        while self._segments:
            self._segments.pop().remove()

    def _oldest(self, num_bytes: int) -> OwnedSegment:
        """The segment to write to, which then counts as written last."""
        if len(self._segments) < self._num_segments:
            oldest = create_segment(self._prefix, num_bytes)
        else:
            oldest = next(each for each in self._segments if each is not self._kept)
            self._segments.remove(oldest)
            if oldest.segment.capacity < num_bytes:
                oldest.remove()
                oldest = create_segment(self._prefix, num_bytes)
        self._segments.append(oldest)
        return oldest

    def _digests(self, payload: NDArray[np.uint8]) -> tuple[bytes, ...]:
        newest = self.newest
        digests = []
        for index in range(num_chunks(payload.size, self._chunk_bytes)):
            where = slice(index * self._chunk_bytes, (index + 1) * self._chunk_bytes)
            chunk = payload[where]
            if newest is not None and _equal(chunk, newest.payload[where]):
                digests.append(newest.manifest.chunk_digests[index])
            else:
                digests.append(chunk_digest(chunk))
        return tuple(digests)


class Written:
    """What the newest segment holds."""

    def __init__(self, manifest: Manifest, payload: NDArray[np.uint8]) -> None:
        self.manifest = manifest
        self.payload = payload


class OwnedSegment:
    """A segment that this process may write to, with its file, whose lock says who uses it."""

    def __init__(self, segment: Segment, path: Path, file: int) -> None:
        self.segment = segment
        self.file = file
        self._path = path

    def remove(self) -> None:
        """Removes the file; who has it mapped keeps the bytes."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Gives up the lock, and leaves the file."""
        os.close(self.file)


def create_segment(prefix: str, num_bytes: int, *, spill: bool = True) -> OwnedSegment:
    """Makes a segment of zeros, its pages reserved. Raises WeightTransferError when there is no room.

    spill: take the folder for temporary files where shared memory has no room.
    """
    name = f"{prefix}.{secrets.token_hex(8)}"
    refusals = []
    for directory in _directories() if spill else _directories()[:1]:
        try:
            return _create_in(directory, name, num_bytes)
        except OSError as error:
            refusals.append(f"{directory}: {error}")
            if not spill:
                break
            _log.warning(
                "%s has no room for a weight segment of %d bytes (%s); publishing takes longer elsewhere",
                directory, num_bytes, error,
            )  # fmt: skip
    raise WeightTransferError(f"no room for a weight segment of {num_bytes} bytes: {'; '.join(refusals)}")


def find_segments(prefix: str) -> list[Path]:
    """The segments of this host whose names begin so."""
    paths = (path for directory in _directories() for path in directory.glob(f"{prefix}.*"))
    return [path for path in paths if _NAME.fullmatch(path.name)]


def adopt_segment(path: Path, num_bytes: int) -> OwnedSegment | None:
    """Maps a segment for writing that another process of this user made. Takes no lock.

    None if it is gone, another user's, or not of that size (yet).
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(file)
    if status.st_uid != os.geteuid() or status.st_size != HEADER_BYTES + num_bytes:
        os.close(file)
        return None
    return OwnedSegment(Segment(mmap.mmap(file, status.st_size), path.name), path, file)


def _create_in(directory: Path, name: str, num_bytes: int) -> OwnedSegment:
    path = directory / name
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Reserves the pages: without it a full /dev/shm would kill the writer with SIGBUS.
        os.posix_fallocate(file, 0, HEADER_BYTES + num_bytes)
        return OwnedSegment(Segment(mmap.mmap(file, HEADER_BYTES + num_bytes), name), path, file)
    except OSError:
        path.unlink(missing_ok=True)
        os.close(file)
        raise


def run_prefix(run_id: str) -> str:
    """What the names of a run's segments begin with."""
    return _RUN + re.sub(r"[^A-Za-z0-9_-]", "-", run_id)[:48]


def remove_stale(prefix: str) -> None:
    """Another run's may serve its actors until its trainer is started again: they stay for a while."""
    old = [path for path in find_segments(f"{_RUN}*") if _age_seconds(path) > _ABANDONED_SECONDS]
    for path in {*find_segments(prefix), *old}:
        if _is_abandoned(path):
            _log.info("removing %s, which a dead process left behind", path)
            path.unlink(missing_ok=True)


def _age_seconds(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_abandoned(path: Path) -> bool:
    try:
        file = os.open(path, _READ)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(file)


def segment_folder() -> Path:
    """Where segments lie, if it has room for them."""
    return next(directory for directory in _directories() if directory.is_dir())


def _directories() -> tuple[Path, ...]:
    return (_SHARED_MEMORY, Path(tempfile.gettempdir()))


def _equal(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> bool:
    """Whether two chunks are equal; a look at their beginnings settles it for most that are not."""
    if left.size != right.size or not np.array_equal(left[:_PROBE_BYTES], right[:_PROBE_BYTES]):
        return False
    return np.array_equal(left, right)
