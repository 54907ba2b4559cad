"""What a version consists of, and the digests that prove it.

The layout is that of protos/penstock/v1/weights.proto: tensors packed in the
manifest's order, each at a multiple of 64 bytes, gaps zero; chunks of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass


from penstock.trajectory import PolicyVersion

ALIGNMENT = 64
CHUNK_BYTES = 1024 * 1024
DIGEST_BYTES = 32


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


Medium = SharedMemoryMedium | ZeromqMedium


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    version: PolicyVersion
    tensors: tuple[TensorEntry, ...]
    num_bytes: int
    chunk_bytes: int
    chunk_digests: tuple[bytes, ...]
    digest: str
    media: tuple[Medium, ...] = ()
