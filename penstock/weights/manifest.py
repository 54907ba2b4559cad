"""What a version consists of, and the digests that prove it.

The layout is that of protos/penstock/v1/weights.proto: tensors packed in the
manifest's order, each at a multiple of 64 bytes, gaps zero; chunks of equal size, the
last of them shorter.

The overall digest is BLAKE3-256 over these bytes (integers are unsigned 64-bit
little-endian, strings are UTF-8 behind their length):

    "penstock weights 1\\n"
    chunk_bytes, number of tensors
    for each tensor: name, dtype, number of dimensions, each dimension, offset, num_bytes
    number of chunks, each chunk's digest

so it is a function of the tensors alone, and not of the version or of the media.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from penstock.errors import ProtocolError
from penstock.trajectory import PolicyVersion

ALIGNMENT = 64
CHUNK_BYTES = 1024 * 1024
MAX_CHUNK_BYTES = 8 * 1024 * 1024
DIGEST_BYTES = 32
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes an element, by safetensors' name of the dtype."""

MAX_DELTAS = 64
MAX_RANK = 4096

_PREAMBLE = b"penstock weights 1\n"
_ADAPTER_PREAMBLE = b"penstock adapter 1\n"
_DELTA_PREAMBLE = b"penstock delta 1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    name: str
    dtype: str
    """safetensors' name: "F32", "BF16", "F16"."""
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemoryMedium:
    name: str
    nonce: str
    """The segment's first 16 bytes, in hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeromqMedium:
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveMedium:
    """The version is broadcast to the members of a group; nobody else can take it this way."""

    group: str


Medium = SharedMemoryMedium | ZeromqMedium | CollectiveMedium


class WeightsMedium(StrEnum):
    """What a run, and an actor, says of broadcasts."""

    AUTO = "auto"
    PULL = "pull"
    COLLECTIVE = "collective"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """Bytes that are fetched in chunks, each named by its digest."""

    version: PolicyVersion
    """The version that the bytes are, or make."""
    num_bytes: int
    chunk_bytes: int
    chunk_digests: tuple[bytes, ...]
    digest: str
    """Names these bytes, in hexadecimal."""

    def chunk(self, index: int) -> slice:
        """Where chunk `index` lies in the buffer."""
        start = index * self.chunk_bytes
        return slice(start, min(start + self.chunk_bytes, self.num_bytes))

    def size_of(self, index: int) -> int:
        """Bytes of chunk `index`."""
        where = self.chunk(index)
        return int(where.stop - where.start)

    def origin(self, index: int) -> tuple[str, int]:
        """The digest of the blob that a server knows, and the chunk's index in it."""
        return self.digest, index


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Blob):
    """A version with the same tensors as the manifest's, that stays for many publications."""

    segment: SharedMemoryMedium


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Blob):
    """What makes one version of another: penstock/weights/delta.py."""

    base: str
    """Digest of the version that it is applied to."""
    result: str
    """Digest of the version that it makes."""
    segment: SharedMemoryMedium


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A matrix of the base that a low-rank product is added to."""

    tensor: str
    """Its name."""
    rank: int
    scale: float
    """What the product is multiplied by, as a float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUpdate(Blob):
    """Low-rank factors that make the manifest's version of a base: penstock/weights/adapters.py."""

    base: Snapshot
    """What they are added to: the same for all versions of a trainer."""
    factors: tuple[Factor, ...]
    """The bytes hold B and then A of each, float32, little-endian."""
    segment: SharedMemoryMedium


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Blob):
    """A version, and the ways to it."""

    tensors: tuple[TensorEntry, ...]
    media: tuple[Medium, ...] = ()
    deltas: tuple[Delta, ...] = ()
    """Each made for the result of the one before it; the last one makes this version."""
    snapshot: Snapshot | None = None
    adapter: AdapterUpdate | None = None
    """Instead of deltas and snapshot, where adapters are trained."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostTensor:
    """A tensor in host memory, of whatever library, as bytes."""

    name: str
    dtype: str
    """safetensors' name: "F32", "BF16", "F16"."""
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    """[num_bytes] uint8, contiguous: the elements in row-major order, little-endian."""


def plan_layout(tensors: Iterable[HostTensor]) -> tuple[tuple[TensorEntry, ...], int]:
    """Places tensors one after another. Returns the entries and the buffer's size in bytes.

    Raises ValueError for a dtype that is not transported, or data of the wrong size.
    """
    held = list(tensors)
    entries, end = plan_shapes((tensor.name, tensor.dtype, tensor.shape) for tensor in held)
    for entry, tensor in zip(entries, held, strict=True):
        if tensor.data.shape != (entry.num_bytes,) or tensor.data.dtype != np.uint8:
            raise ValueError(
                f"tensor {tensor.name!r} of {tensor.dtype}{list(tensor.shape)} has data of "
                f"{tensor.data.dtype}{list(tensor.data.shape)}; expected {entry.num_bytes} uint8"
            )
    return entries, end


def plan_shapes(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[tuple[TensorEntry, ...], int]:
    """plan_layout for tensors whose data is elsewhere: names, dtypes, shapes. Raises ValueError."""
    entries: list[TensorEntry] = []
    end = 0
    for name, dtype, shape in tensors:
        num_bytes = _tensor_bytes(dtype, shape)
        if num_bytes is None:
            raise ValueError(
                f"tensor {name!r} has dtype {dtype}; expected a dtype among {sorted(DTYPE_BYTES)}"
            )
        offset = _aligned(end)
        end = offset + num_bytes
        entries.append(TensorEntry(name=name, dtype=dtype, shape=shape, offset=offset, num_bytes=num_bytes))
    return tuple(entries), end


def pack(buffer: NDArray[np.uint8], entries: Sequence[TensorEntry], tensors: Sequence[HostTensor]) -> None:
    """Writes tensors to their places, and zeros to the gaps."""
    end = 0
    for entry, tensor in zip(entries, tensors, strict=True):
        buffer[end : entry.offset] = 0
        end = entry.offset + entry.num_bytes
        buffer[entry.offset : end] = tensor.data


def num_chunks(num_bytes: int, chunk_bytes: int) -> int:
    return -(-num_bytes // chunk_bytes)


def chunk_digest(data: NDArray[np.uint8]) -> bytes:
    """BLAKE3-256 of one chunk."""
    return blake3(data.data).digest()


def table_digest(tensors: Sequence[TensorEntry], chunk_bytes: int, chunk_digests: Sequence[bytes]) -> str:
    """The digest that names the whole set of tensors, in hexadecimal. See the module's docstring."""
    digest = blake3(_PREAMBLE)
    digest.update(_integers(chunk_bytes, len(tensors)))
    for tensor in tensors:
        digest.update(_text(tensor.name) + _text(tensor.dtype))
        digest.update(_integers(len(tensor.shape), *tensor.shape, tensor.offset, tensor.num_bytes))
    digest.update(_integers(len(chunk_digests)))
    digest.update(b"".join(chunk_digests))
    return digest.hexdigest()


def delta_digest(base: str, result: str, chunk_bytes: int, chunk_digests: Sequence[bytes]) -> str:
    """The digest that names a delta, in hexadecimal."""
    digest = blake3(_DELTA_PREAMBLE)
    digest.update(_text(base) + _text(result) + _integers(chunk_bytes, len(chunk_digests)))
    digest.update(b"".join(chunk_digests))
    return digest.hexdigest()


def adapter_digest(base: str, result: str, factors: Sequence[Factor], chunk_digests: Sequence[bytes]) -> str:
    """The digest that names a version's factors, in hexadecimal."""
    digest = blake3(_ADAPTER_PREAMBLE)
    digest.update(_text(base) + _text(result) + _integers(len(factors)))
    for factor in factors:
        digest.update(_text(factor.tensor) + _integers(factor.rank) + struct.pack("<f", factor.scale))
    digest.update(b"".join(chunk_digests))
    return digest.hexdigest()


def verify_chunk(blob: Blob, index: int, data: NDArray[np.uint8]) -> bool:
    """Whether `data` is chunk `index` of the blob, to the bit."""
    where = blob.chunk(index)
    return data.size == where.stop - where.start and chunk_digest(data) == blob.chunk_digests[index]


def check_manifest(manifest: Manifest) -> None:
    """Raises ProtocolError unless the manifest's parts agree with each other and with its digest."""
    if not ALIGNMENT <= manifest.chunk_bytes <= MAX_CHUNK_BYTES:
        raise ProtocolError(
            f"manifest has chunks of {manifest.chunk_bytes} bytes; expected {ALIGNMENT} to {MAX_CHUNK_BYTES}"
        )
    _check_tensors(manifest)
    _check_chunks(manifest)
    digest = table_digest(manifest.tensors, manifest.chunk_bytes, manifest.chunk_digests)
    if manifest.digest != digest:
        raise ProtocolError(
            f"manifest of version {manifest.version} says digest {manifest.digest!r}, but its tensor table "
            f"and chunk digests make {digest!r}; ask for the manifest again"
        )
    _check_deltas(manifest)
    if manifest.snapshot is not None:
        _check_snapshot(manifest, manifest.snapshot)
    if manifest.adapter is not None:
        _check_adapter(manifest, manifest.adapter)


def _check_chunks(blob: Blob) -> None:
    expected = num_chunks(blob.num_bytes, blob.chunk_bytes)
    if len(blob.chunk_digests) != expected:
        raise ProtocolError(
            f"manifest has {len(blob.chunk_digests)} chunk digests for {blob.num_bytes} bytes "
            f"in chunks of {blob.chunk_bytes}; expected {expected}"
        )
    if any(len(digest) != DIGEST_BYTES for digest in blob.chunk_digests):
        raise ProtocolError(f"manifest has a chunk digest that is not of {DIGEST_BYTES} bytes")


def _check_deltas(manifest: Manifest) -> None:
    if len(manifest.deltas) > MAX_DELTAS:
        raise ProtocolError(f"manifest has {len(manifest.deltas)} deltas; expected at most {MAX_DELTAS}")
    needed = [*(delta.base for delta in manifest.deltas), manifest.digest][1:]
    for delta, following in zip(manifest.deltas, needed, strict=True):
        if not 0 < delta.num_bytes <= manifest.num_bytes or not 0 < delta.chunk_bytes <= manifest.chunk_bytes:
            raise ProtocolError(
                f"the delta to version {delta.version} has {delta.num_bytes} bytes in chunks of "
                f"{delta.chunk_bytes}; expected at most the version's {manifest.num_bytes} and {manifest.chunk_bytes}"
            )
        _check_chunks(delta)
        if delta.result != following:
            raise ProtocolError(
                f"the delta to version {delta.version} makes {delta.result!r}, and what follows it needs "
                f"{following!r}"
            )


def _check_snapshot(manifest: Manifest, snapshot: Snapshot) -> None:
    _check_chunks(snapshot)
    digest = table_digest(manifest.tensors, manifest.chunk_bytes, snapshot.chunk_digests)
    sizes = snapshot.num_bytes, snapshot.chunk_bytes
    if (digest, manifest.num_bytes, manifest.chunk_bytes) != (snapshot.digest, *sizes):
        raise ProtocolError(
            f"the snapshot of version {snapshot.version} says digest {snapshot.digest!r} and sizes {sizes}; with "
            f"the manifest's tensors its chunk digests make {digest!r}"
        )


def _check_adapter(manifest: Manifest, adapter: AdapterUpdate) -> None:
    _check_snapshot(manifest, adapter.base)
    _check_chunks(adapter)
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    num_bytes = 0
    for factor in adapter.factors:
        tensor = tensors.pop(factor.tensor, None)
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype not in ("F32", "BF16"):
            raise ProtocolError(
                f"version {manifest.version} has a factor for {factor.tensor!r}; expected matrices of the manifest "
                "in F32 or BF16, each once"
            )
        if not 0 < factor.rank <= MAX_RANK or not math.isfinite(factor.scale):
            raise ProtocolError(
                f"the factor for {factor.tensor!r} has rank {factor.rank} and scale {factor.scale}; expected a rank "
                f"of 1 to {MAX_RANK} and a number"
            )
        num_bytes += 4 * factor.rank * sum(tensor.shape)
    if adapter.num_bytes != num_bytes or adapter.chunk_bytes != manifest.chunk_bytes:
        raise ProtocolError(
            f"the factors of version {manifest.version} have {adapter.num_bytes} bytes in chunks of "
            f"{adapter.chunk_bytes}; expected {num_bytes}, and the manifest's chunks"
        )


def _check_tensors(manifest: Manifest) -> None:
    if not manifest.tensors:
        raise ProtocolError("manifest names no tensors; expected at least one")
    names: set[str] = set()
    end = 0
    for tensor in manifest.tensors:
        if not tensor.name or tensor.name in names:
            raise ProtocolError(f"manifest has a tensor named {tensor.name!r} twice, or without a name")
        names.add(tensor.name)
        num_bytes = _tensor_bytes(tensor.dtype, tensor.shape)
        if num_bytes is None:
            raise ProtocolError(
                f"tensor {tensor.name!r} has dtype {tensor.dtype!r}; expected one of {sorted(DTYPE_BYTES)}"
            )
        if tensor.num_bytes != num_bytes:
            raise ProtocolError(
                f"tensor {tensor.name!r} of {tensor.dtype}{list(tensor.shape)} has {tensor.num_bytes} bytes; "
                f"expected {num_bytes}"
            )
        if tensor.offset != _aligned(end):
            raise ProtocolError(
                f"tensor {tensor.name!r} starts at byte {tensor.offset}; expected {_aligned(end)}, the first "
                f"multiple of {ALIGNMENT} behind the tensor before it"
            )
        end = tensor.offset + num_bytes
    if manifest.num_bytes != end:
        raise ProtocolError(f"manifest has {manifest.num_bytes} bytes; its tensors end at byte {end}")


def _tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    element = DTYPE_BYTES.get(dtype)
    return None if element is None else element * math.prod(shape)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return _integers(len(encoded)) + encoded
