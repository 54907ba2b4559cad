"""Low-rank factors, and the one way in which they are added to a base: to the bit, on every machine.

A version of a run that trains adapters (LoRA) is W = W0 + scale * B A for some of the base's
matrices, and the base for all else. Learner and actors compute it by the same loop: for each
element the products are added in the order of the rank, in float32, each operation rounded for
itself, and the sum is rounded once to the base's dtype. So two machines make the same bytes,
which the version's digests prove, and since W0 is kept, versions do not drift.

numba compiles the loop at its first use, or loads what an earlier process compiled. Import this
module where factors are at hand, for numba takes a while to load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.weights.buffer import num_threads
from penstock.weights.compiled import compiled
from penstock.weights.manifest import Factor, TensorEntry

_BLOCK_BYTES = 4 * 1024 * 1024
"""Of a matrix, for one thread at a time."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """What is added to one matrix of the base."""

    factor: Factor
    b: Floats
    """[rows, rank] float32, contiguous."""
    a: Floats
    """[rank, columns] float32, contiguous."""


def pack_factors(parts: Sequence[LowRank]) -> NDArray[np.uint8]:
    """B and then A of each, one behind the other, as they travel."""
    return np.concatenate([array.reshape(-1).view(np.uint8) for part in parts for array in (part.b, part.a)])


def unpack_factors(
    data: NDArray[np.uint8], factors: Sequence[Factor], tensors: Sequence[TensorEntry]
) -> list[LowRank]:
    """The parts of `pack_factors`. The sizes agree, or `check_manifest` would have refused them."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    floats = np.frombuffer(data.tobytes(), dtype="<f4")
    parts, end = [], 0
    for factor in factors:
        rows, columns = shapes[factor.tensor]
        middle = end + rows * factor.rank
        start, end = end, middle + factor.rank * columns
        b, a = floats[start:middle], floats[middle:end]
        parts.append(
            LowRank(factor=factor, b=b.reshape(rows, factor.rank), a=a.reshape(factor.rank, columns))
        )
    return parts


def merge(
    base: NDArray[np.uint8],
    tensors: Sequence[TensorEntry],
    parts: Sequence[LowRank],
    out: NDArray[np.uint8],
) -> None:
    """Makes a version of a base.

    base, out: [num_bytes] uint8, packed as `tensors` say; `out` is overwritten.
    """
    by_name = {part.factor.tensor: part for part in parts}
    with ThreadPoolExecutor(num_threads(), thread_name_prefix="merge") as threads:
        work = []
        copied = 0
        for entry in tensors:
            part = by_name.get(entry.name)
            if part is None:
                continue
            work.append(threads.submit(_copy, base, out, copied, entry.offset))
            work += [threads.submit(_merge_rows, base, entry, part, out, rows) for rows in _blocks(entry)]
            copied = entry.offset + entry.num_bytes
        work.append(threads.submit(_copy, base, out, copied, out.size))
        for done in work:
            done.result()


def merge_matrix(base: Floats, part: LowRank) -> Floats:
    """W0 + scale * B A of one float32 matrix, [rows, columns]."""
    merged = np.empty_like(base)
    _add_f32(base, part.b, part.a, np.float32(part.factor.scale), merged)
    return merged


def _copy(base: NDArray[np.uint8], out: NDArray[np.uint8], start: int, stop: int) -> None:
    out[start:stop] = base[start:stop]


def _blocks(entry: TensorEntry) -> Iterator[slice]:
    """Rows of a matrix that make about a block."""
    rows = entry.shape[0]
    step = max(1, _BLOCK_BYTES * rows // max(1, entry.num_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _merge_rows(
    base: NDArray[np.uint8], entry: TensorEntry, part: LowRank, out: NDArray[np.uint8], rows: slice
) -> None:
    where = slice(entry.offset, entry.offset + entry.num_bytes)
    word, add = (np.float32, _add_f32) if entry.dtype == "F32" else (np.uint16, _add_bf16)
    old, new = (each[where].view(word).reshape(entry.shape)[rows] for each in (base, out))
    add(_read_only(old), part.b[rows], part.a, np.float32(part.factor.scale), new)


def _read_only(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """The compiled loops know one kind of input."""
    view = array.view()
    view.flags.writeable = False
    return view


@compiled
def _add_f32(base, b, a, scale, out):  # type: ignore[no-untyped-def]
    """base, out: [R, C] float32; b: [R, K], a: [K, C] float32."""
    total = np.empty(a.shape[1], dtype=np.float32)
    for row in range(base.shape[0]):
        total[:] = np.float32(0.0)
        for rank in range(a.shape[0]):
            weight = b[row, rank]
            for column in range(a.shape[1]):
                total[column] += weight * a[rank, column]
        for column in range(a.shape[1]):
            out[row, column] = base[row, column] + scale * total[column]


@compiled
def _add_bf16(base, b, a, scale, out):  # type: ignore[no-untyped-def]
    """_add_f32 with base, out: [R, C] bfloat16 as uint16; rounds to nearest, ties to even."""
    columns = a.shape[1]
    total = np.empty(columns, dtype=np.float32)
    wide = np.empty(columns, dtype=np.uint32)
    values = wide.view(np.float32)
    for row in range(base.shape[0]):
        total[:] = np.float32(0.0)
        for rank in range(a.shape[0]):
            weight = b[row, rank]
            for column in range(columns):
                total[column] += weight * a[rank, column]
        for column in range(columns):
            wide[column] = np.uint32(base[row, column]) << np.uint32(16)
        for column in range(columns):
            values[column] = values[column] + scale * total[column]
        for column in range(columns):
            word = wide[column]
            even = (word >> np.uint32(16)) & np.uint32(1)
            out[row, column] = np.uint16((word + np.uint32(0x7FFF) + even) >> np.uint32(16))
