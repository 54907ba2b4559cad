"""The lossless difference between two versions: few bytes, since few weights move far.

At the learning rates of reinforcement learning about one bf16 weight in a hundred changes
in a step, and nine in ten of those move by one unit in the last place. So weights are taken
as unsigned integers of their width (the same for bf16, fp16 and fp32, NaN or not), and a
change costs a gap to the change before it, and a step.

A delta is a sequence of frames, each over a span within one block of FRAME_BYTES of the packed
buffer, in rising order and without overlap; what no frame covers did not change. A frame is
a header (`_HEADER`, little-endian), then five streams, each stored as it is or by zstd:

    gaps      bytes: equal words before each change; 255 adds 255 and goes on
    signs     a bit a change, the lowest first: the word goes up by a unit (0), or down (1)
    others    bytes like gaps: changes of one unit before each change that is more
    extras    a byte for each of these: so many units more in the same direction; 0: it is a word
    words     for each extra 0: the new word

A frame that would have more than MAX_DENSITY changes is dense: its `words` are all there
are. Adding is exact only on the base that the delta was made from: whoever applies one
compares the base's digest before, and the result's after.

Import this module where a delta is at hand, for numba (delta_loops.py) takes a while to load.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.weights.delta_loops import AHEAD, LONG_GAP, PLACES, add_frames, write_changes
from penstock.weights.manifest import DTYPE_BYTES, TensorEntry

FRAME_BYTES = 4 * 1024 * 1024
"""Frames do not cross multiples of it: large enough for zstd, small enough for a cache."""
MAX_DENSITY = 0.15
"""Changes a word, above which a frame is dense."""

Words = NDArray[Any]
"""[N] uint16 or uint32."""

_Word = TypeVar("_Word", bound=np.generic)

# offset; words, changes; width, compressed streams (bit i: stream i), two zeros; stored and plain sizes.
_HEADER = struct.Struct("<QII BBxx 5I 5I")
_NUM_STREAMS = 5
_WHOLE = 4
"""The stream of words, which is all that a dense frame has."""
_WORDS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_LEVEL = 1
_TRIED_BYTES = 4096
"""Of a long stream, before all of it is compressed."""
_PAYS = 7 / 8
"""A stream that zstd makes hardly smaller is stored as it is: decompressing costs more than its few bytes."""


class Frame(NamedTuple):
    """Where a frame lies in its delta, and what it covers."""

    offset: int
    """In the packed buffer, in bytes."""
    num_words: int
    num_changes: int
    """As many as words in a dense frame."""
    width: int
    """Bytes a word: 2 or 4."""
    compressed: int
    edges: tuple[int, ...]
    """Where the five streams begin in the delta, and where the last one ends."""
    plain_bytes: tuple[int, ...]
    """Their sizes when they are not compressed: of gaps, signs, others, extras, words."""

    @property
    def end(self) -> int:
        return self.offset + self.num_words * self.width

    @property
    def lies(self) -> slice:
        """Header and streams, in the delta."""
        return slice(self.edges[0] - _HEADER.size, self.edges[-1])

    @property
    def is_dense(self) -> bool:
        return self.num_changes == self.num_words


Change = tuple[NDArray[np.uint8], Frame]
"""A delta, and a frame of it."""


class _Scratch:
    """Room for the streams of the most changes that a sparse frame of `num_words` may have."""

    def __init__(self, num_words: int) -> None:
        most = int(num_words * MAX_DENSITY)
        self.num_words = num_words
        self.places: NDArray[np.uint64] = np.empty(PLACES, dtype=np.uint64)
        self.gaps: NDArray[np.uint8] = np.empty(most + num_words // LONG_GAP, dtype=np.uint8)
        self.signs: NDArray[np.uint8] = np.empty(most // 8 + 1, dtype=np.uint8)
        # One more: what is written and not there.
        self.others: NDArray[np.uint8] = np.empty(most + most // LONG_GAP + 1, dtype=np.uint8)
        self.extras: NDArray[np.uint8] = np.empty(most + 1, dtype=np.uint8)
        self.words: NDArray[np.uint8] = np.empty(most * 4, dtype=np.uint8)


class FrameEncoder:
    """Encodes spans one after another. For one thread at a time: it has scratch memory."""

    def __init__(self, *, compress: bool = True) -> None:
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL) if compress else None
        self._scratch: _Scratch | None = None

    def encode(self, offset: int, old: Words, new: Words) -> bytes:
        """One frame that makes `new` of `old`; nothing if they are equal.

        offset: of the span in the packed buffer, in bytes.
        old, new: [N] uint16 or uint32, contiguous, of the same size and dtype.
        """
        if old.dtype != new.dtype or old.shape != new.shape or not 0 < new.nbytes <= FRAME_BYTES:
            raise ValueError(
                f"a frame from {old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}; expected the same "
                f"dtype and size, of at most {FRAME_BYTES} bytes"
            )
        old, new = _as_input(old), _as_input(new)
        scratch = self._scratch_for(new)
        most = int(new.size * MAX_DENSITY)
        num_changes, num_gaps, num_others, num_extras, num_words = write_changes(
            old, new, most, scratch.places,
            scratch.gaps, scratch.signs, scratch.others, scratch.extras, scratch.words.view(new.dtype),
        )  # fmt: skip
        if num_changes == 0:
            return b""
        if num_changes > most:
            return self._frame(offset, new, new.size, (b"", b"", b"", b"", new.tobytes()))
        streams = (
            scratch.gaps[:num_gaps].tobytes(),
            scratch.signs[: -(-num_changes // 8)].tobytes(),
            scratch.others[:num_others].tobytes(),
            scratch.extras[:num_extras].tobytes(),
            scratch.words[: num_words * new.itemsize].tobytes(),
        )
        return self._frame(offset, new, num_changes, streams)

    def _scratch_for(self, new: Words) -> _Scratch:
        if self._scratch is None or self._scratch.num_words < new.size:
            self._scratch = _Scratch(new.size)
        return self._scratch

    def _frame(self, offset: int, new: Words, num_changes: int, streams: tuple[bytes, ...]) -> bytes:
        stored, compressed = list(streams), 0
        for index, stream in enumerate(streams):
            smaller = self._compressed(stream)
            if smaller is not None:
                stored[index] = smaller
                compressed |= 1 << index
        header = _HEADER.pack(
            offset, new.size, num_changes, new.itemsize, compressed,
            *(len(stream) for stream in stored), *(len(stream) for stream in streams),
        )  # fmt: skip
        return b"".join((header, *stored))

    def _compressed(self, stream: bytes) -> bytes | None:
        """None where that hardly makes it smaller, which a long stream's beginning tells."""
        if self._compressor is None or len(stream) <= 16:
            return None
        for piece in (stream[:_TRIED_BYTES], stream) if len(stream) > 2 * _TRIED_BYTES else (stream,):
            smaller = self._compressor.compress(piece)
            if len(smaller) >= _PAYS * len(piece):
                return None
        return smaller


def frames_of(delta: NDArray[np.uint8], num_bytes: int) -> Iterator[Frame]:
    """The frames of a delta between versions of `num_bytes`, in order.

    Raises WeightTransferError for what is no such delta. Reads the headers only.
    """
    end = 0
    for frame in _frames(delta):
        block = frame.offset // FRAME_BYTES * FRAME_BYTES
        if not end <= frame.offset < frame.end <= min(num_bytes, block + FRAME_BYTES):
            raise WeightTransferError(
                f"a delta has a frame for bytes {frame.offset} to {frame.end}; expected it behind byte {end}, "
                f"within the version's {num_bytes}, and not across a multiple of {FRAME_BYTES}"
            )
        end = frame.end
        yield frame


def _frames(delta: NDArray[np.uint8]) -> Iterator[Frame]:
    position = 0
    while position < delta.size:
        frame, position = _parse(delta, position)
        yield frame


class FrameDecoder:
    """Applies frames. For one thread at a time: it has scratch memory."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()
        self._positions: NDArray[np.uint32] = np.empty(0, dtype=np.uint32)
        self._places = self._positions

    def apply(self, changes: Iterable[Change], version: NDArray[np.uint8]) -> None:
        """Makes the new bytes of the old, in place, frame after frame.

        version: [num_bytes] uint8, writable, of all that the frames cover.
        Raises WeightTransferError if streams contradict each other; then what that frame covers is
        spoilt, and nothing beyond it was touched.
        """
        for (is_dense, width), group in itertools.groupby(
            changes, lambda each: (each[1].is_dense, each[1].width)
        ):
            if is_dense:
                for delta, frame in group:
                    version[frame.offset : frame.end] = self._stream(delta, frame, _WHOLE)
            else:
                self._add(list(group), _WORDS[width], version)

    def _add(self, changes: Sequence[Change], dtype: np.dtype[Any], version: NDArray[np.uint8]) -> None:
        """Sparse frames of words of one dtype, in one call: between two, threads would wait for each other."""
        frames = [frame for _, frame in changes]
        start, end = min(frame.offset for frame in frames), max(frame.end for frame in frames)
        gaps, signs, others, extras, words = (
            np.concatenate([self._stream(delta, frame, index) for delta, frame in changes])
            for index in range(_NUM_STREAMS)
        )
        table = np.array(
            [((f.offset - start) // f.width, f.num_words, f.num_changes, *f.plain_bytes) for f in frames],
            dtype=np.int64,
        )
        table[:, -1] //= dtype.itemsize
        most = AHEAD + max(max(gaps, others) for gaps, _, others, *_ in (f.plain_bytes for f in frames))
        if self._positions.size < most:
            self._positions, self._places = np.empty((2, most), dtype=np.uint32)
        num_applied = add_frames(
            version[start:end].view(dtype), table,
            gaps, signs, others, extras, words.view(dtype), self._positions, self._places,
        )  # fmt: skip
        if num_applied < len(frames):
            bad = frames[num_applied]
            raise WeightTransferError(
                f"the delta for bytes {bad.offset} to {bad.end} contradicts itself: {bad.num_changes} "
                f"changes in {bad.num_words} words do not fit its streams"
            )

    def _stream(self, delta: NDArray[np.uint8], frame: Frame, index: int) -> NDArray[np.uint8]:
        """Raises WeightTransferError unless a stream has the size that its header says."""
        stored, size = delta[frame.edges[index] : frame.edges[index + 1]], frame.plain_bytes[index]
        if not frame.compressed >> index & 1:
            return stored
        try:
            # A stated size that is wrong would be allocated before it is found to be wrong.
            if zstandard.frame_content_size(stored.data) == size:
                plain = self._decompressor.decompress(stored.data, max_output_size=size)
                if len(plain) == size:
                    return np.frombuffer(plain, dtype=np.uint8)
        except zstandard.ZstdError as error:
            raise WeightTransferError(f"stream {index} of a frame cannot be decompressed: {error}") from error
        raise WeightTransferError(f"stream {index} of a frame does not have the {size} bytes that it should")


class ArrivingDelta:
    """A delta whose bytes come in order, and the frames of it that are here."""

    def __init__(self, delta: NDArray[np.uint8], num_bytes: int) -> None:
        """delta: where its bytes come to. num_bytes: of the version."""
        self.data = delta
        self._num_bytes = num_bytes
        self._frames = frames_of(delta, num_bytes)
        self._next: Frame | None = None
        """The first one that is not here whole, if its header is."""
        self._read = 0
        """Where it begins."""
        self._known = 0
        self._here: collections.deque[Frame] = collections.deque()

    def arrived(self, num_bytes: int) -> int:
        """Its first `num_bytes` are here. Returns up to which byte of the version all changes are known.

        Raises WeightTransferError for what is no delta.
        """
        while self._read < self.data.size:
            if self._next is None:
                if min(self._read + _HEADER.size, self.data.size) > num_bytes:
                    return self._known
                self._next = next(self._frames)
                self._known = self._next.offset
            if self._next.lies.stop > num_bytes:
                return self._known
            self._read, self._known = self._next.lies.stop, self._next.end
            self._here.append(self._next)
            self._next = None
        return self._num_bytes

    def take(self, end: int) -> list[Frame]:
        """The frames that are here up to byte `end` of the version, which are given out once."""
        taken = []
        while self._here and self._here[0].end <= end:
            taken.append(self._here.popleft())
        return taken


def apply_all(deltas: Sequence[NDArray[np.uint8]], version: NDArray[np.uint8], *, num_threads: int) -> None:
    """Applies deltas one after the other, in place: all of them to a block while it is in the cache.

    Raises WeightTransferError.
    """
    blocks: dict[int, list[Change]] = {}
    for delta in deltas:
        for frame in frames_of(delta, version.size):
            blocks.setdefault(frame.offset // FRAME_BYTES, []).append((delta, frame))

    if num_threads == 1:
        decoder = FrameDecoder()
        for changes in blocks.values():
            decoder.apply(changes, version)
        return
    # The loops and zstd run without the interpreter's lock.
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(lambda changes: FrameDecoder().apply(changes, version), blocks.values()))


def merge(deltas: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """One delta of several that cover different bytes of the same two versions."""
    frames = heapq.merge(
        *([(frame.offset, delta[frame.lies]) for frame in _frames(delta)] for delta in deltas),
        key=lambda each: each[0],
    )
    return np.concatenate([np.empty(0, dtype=np.uint8), *(encoded for _, encoded in frames)])


def encode_version(
    tensors: Sequence[TensorEntry], old: NDArray[np.uint8], new: NDArray[np.uint8], *, compress: bool = True
) -> bytes:
    """The delta between two versions of the same tensors.

    old, new: [num_bytes] uint8, packed.
    """
    encoder = FrameEncoder(compress=compress)
    return b"".join(
        encoder.encode(where.start, old[where].view(words), new[where].view(words))
        for where, words in _spans(tensors)
    )


def _spans(tensors: Sequence[TensorEntry]) -> Iterator[tuple[slice, np.dtype[Any]]]:
    """Cuts the packed buffer into runs of one width, and those at the multiples of FRAME_BYTES."""
    for width, run in itertools.groupby(tensors, key=lambda tensor: DTYPE_BYTES[tensor.dtype]):
        entries = [tensor for tensor in run if tensor.num_bytes]
        if entries:
            yield from cut(entries[0].offset, entries[-1].offset + entries[-1].num_bytes, width)


def cut(start: int, end: int, width: int) -> Iterator[tuple[slice, np.dtype[Any]]]:
    """The spans of a run of words of one width, with their dtype."""
    while start < end:
        stop = min(end, (start // FRAME_BYTES + 1) * FRAME_BYTES)
        yield slice(start, stop), _WORDS[width]
        start = stop


def _parse(delta: NDArray[np.uint8], position: int) -> tuple[Frame, int]:
    """The frame whose header is at `position`, and where the next one is."""
    start = position + _HEADER.size
    if start > delta.size:
        raise WeightTransferError(f"a delta of {delta.size} bytes ends within a header")
    offset, num_words, num_changes, width, compressed, *sizes = _HEADER.unpack_from(delta.data, position)
    edges = tuple(itertools.accumulate(sizes[:_NUM_STREAMS], initial=start))
    frame = Frame(offset, num_words, num_changes, width, compressed, edges, tuple(sizes[_NUM_STREAMS:]))
    if edges[-1] > delta.size or not _is_possible(frame):
        raise WeightTransferError(
            f"a delta of {delta.size} bytes has an impossible frame at byte {position}: {frame}"
        )
    return frame, edges[-1]


def _is_possible(frame: Frame) -> bool:
    """Whether a header's numbers can be true together; bounds what is allocated for it."""
    offset, num_words, num_changes, width, compressed, edges, plain_bytes = frame
    if width not in _WORDS or offset % width or compressed >> _NUM_STREAMS:
        return False
    if not 0 < num_changes <= num_words <= FRAME_BYTES // width:
        return False
    for index, plain in enumerate(plain_bytes):
        if not compressed >> index & 1 and edges[index + 1] - edges[index] != plain:
            return False
    gaps, signs, others, extras, words = plain_bytes
    if frame.is_dense:
        return (gaps, signs, others, extras, words) == (0, 0, 0, 0, num_words * width)
    return (
        num_changes <= gaps <= num_changes + num_words // LONG_GAP
        and signs == -(-num_changes // 8)
        and extras <= num_changes
        and extras <= others <= extras + num_changes // LONG_GAP
        and words % width == 0
        and words // width <= extras
    )


def _as_input(array: NDArray[_Word]) -> NDArray[_Word]:
    """A read-only view, or a copy if its words lie askew: the compiled loops know one kind of input."""
    view = array.view() if array.ctypes.data % 8 == 0 else array.copy()
    view.flags.writeable = False
    return view
