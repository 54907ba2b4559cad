"""Layout, digests and the checks of a manifest."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ProtocolError
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import (
    ALIGNMENT,
    DTYPE_BYTES,
    HostTensor,
    Manifest,
    TensorEntry,
    ZeromqMedium,
    check_manifest,
    chunk_digest,
    plan_layout,
    table_digest,
    verify_chunk,
)
from penstock.weights.staged import stage
from tests.weight_fixtures import tensor, tensors

VERSION = PolicyVersion(2, 7)


@st.composite
def tensor_tables(draw: st.DrawFn) -> list[HostTensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6, unique=True))
    return [
        tensor(
            name,
            tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
            dtype=draw(st.sampled_from(sorted(DTYPE_BYTES))),
            seed=draw(st.integers(0, 99)),
        )
        for name in names
    ]


def test_tensors_are_packed_at_multiples_of_64_bytes() -> None:
    entries, num_bytes = plan_layout([tensor("a", (3,)), tensor("b", (17,), dtype="BF16"), tensor("c", ())])
    assert [(entry.offset, entry.num_bytes) for entry in entries] == [(0, 12), (64, 34), (128, 4)]
    assert num_bytes == 132


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused() -> None:
    for dtype, shape, num_bytes in (("F32", (3,), 11), ("F64", (1,), 8), ("BF16", (2, 2), 16)):
        bad = HostTensor(name="x", dtype=dtype, shape=shape, data=np.zeros(num_bytes, dtype=np.uint8))
        with pytest.raises(ValueError, match="'x'"):
            plan_layout([bad])


def test_the_digest_is_that_of_the_documented_bytes() -> None:
    entry = TensorEntry(name="é", dtype="BF16", shape=(2, 3), offset=0, num_bytes=12)
    digests = [bytes(range(32))]
    documented = (
        b"penstock weights 1\n"
        + struct.pack("<QQ", 4096, 1)
        + struct.pack("<Q", 2) + "é".encode()
        + struct.pack("<Q", 4) + b"BF16"
        + struct.pack("<Q", 2) + struct.pack("<QQ", 2, 3)
        + struct.pack("<QQ", 0, 12)
        + struct.pack("<Q", 1) + digests[0]
    )  # fmt: skip
    assert table_digest([entry], 4096, digests) == blake3(documented).hexdigest()


@given(table=tensor_tables())
def test_a_staged_version_holds_its_tensors_and_passes_every_check(table: list[HostTensor]) -> None:
    staged = stage(VERSION, table)
    check_manifest(staged.manifest)
    for entry, each in zip(staged.manifest.tensors, table, strict=True):
        assert entry.offset % ALIGNMENT == 0
        assert np.array_equal(staged.buffer[entry.offset : entry.offset + entry.num_bytes], each.data)
    for index in range(len(staged.manifest.chunk_digests)):
        assert verify_chunk(staged.manifest, index, staged.buffer[staged.manifest.chunk(index)])


@given(table=tensor_tables(), data=st.data())
def test_the_digest_changes_with_every_byte_name_shape_and_dtype(
    table: list[HostTensor], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(table) - 1))
    changed = [*table]
    changed[index] = data.draw(_changes(table[index]))
    assert stage(VERSION, changed).manifest.digest != stage(VERSION, table).manifest.digest


@given(table=tensor_tables())
def test_the_digest_depends_on_nothing_else(table: list[HostTensor]) -> None:
    copied = [dataclasses.replace(each, data=each.data.copy()) for each in table]
    assert stage(PolicyVersion(9, 9), copied).manifest.digest == stage(VERSION, table).manifest.digest


def _changes(original: HostTensor) -> st.SearchStrategy[HostTensor]:
    kinds = [
        st.just(dataclasses.replace(original, name=original.name + "'")),
        st.just(dataclasses.replace(original, shape=(*original.shape, 1))),
    ]
    if original.dtype != "F32":
        other = "F16" if original.dtype == "BF16" else "BF16"
        kinds.append(st.just(dataclasses.replace(original, dtype=other)))
    if original.data.size:
        kinds.append(
            st.builds(
                lambda at, bit: dataclasses.replace(original, data=_flipped(original.data, at, bit)),
                st.integers(0, original.data.size - 1),
                st.integers(0, 7),
            )
        )
    return st.one_of(kinds)


def _flipped(data: np.ndarray, at: int, bit: int) -> np.ndarray:
    flipped = data.copy()
    flipped[at] ^= 1 << bit
    return flipped


def test_a_chunk_is_verified_by_length_and_content() -> None:
    staged = stage(VERSION, tensors())
    chunk = staged.buffer[staged.manifest.chunk(0)]
    assert verify_chunk(staged.manifest, 0, chunk)
    assert not verify_chunk(staged.manifest, 0, chunk[:-1])
    assert not verify_chunk(staged.manifest, 0, _flipped(chunk, 5, 0))


def _good() -> Manifest:
    return stage(VERSION, tensors()).manifest


def _resealed(manifest: Manifest, **changes: object) -> Manifest:
    """With a digest that fits, so that only the change itself can be at fault."""
    changed = dataclasses.replace(manifest, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(
        changed, digest=table_digest(changed.tensors, changed.chunk_bytes, changed.chunk_digests)
    )


def _with_tensor(index: int, **changes: object) -> Manifest:
    good = _good()
    entries = list(good.tensors)
    entries[index] = dataclasses.replace(entries[index], **changes)  # type: ignore[arg-type]
    return _resealed(good, tensors=tuple(entries))


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (_resealed(_good(), tensors=()), "names no tensors"),
        (_with_tensor(2, name="bias"), "'bias' twice"),
        (_with_tensor(0, name=""), "without a name"),
        (_with_tensor(1, dtype="F64"), "dtype 'F64'"),
        (_with_tensor(1, shape=(12,)), "expected 24"),
        (_with_tensor(1, num_bytes=25), "expected 26"),
        (_with_tensor(1, offset=63), "expected 64"),
        (_with_tensor(1, offset=128), "expected 64"),
        (_with_tensor(2, offset=64), "expected 128"),
        (_resealed(_good(), num_bytes=_good().num_bytes + 1), "its tensors end"),
        (_resealed(_good(), chunk_bytes=0), "chunks of 0 bytes"),
        (_resealed(_good(), chunk_bytes=1 << 30), "chunks of 1073741824 bytes"),
        (_resealed(_good(), chunk_digests=()), "expected 1"),
        (_resealed(_good(), chunk_digests=(bytes(32), bytes(32))), "expected 1"),
        (_resealed(_good(), chunk_digests=(bytes(31),)), "not of 32 bytes"),
        (dataclasses.replace(_good(), digest="0" * 64), "ask for the manifest again"),
        (dataclasses.replace(_good(), digest=_good().digest.upper()), "ask for the manifest again"),
    ],
)
def test_a_manifest_whose_parts_disagree_is_refused(manifest: Manifest, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        check_manifest(manifest)


def test_media_and_version_are_not_part_of_the_digest() -> None:
    good = _good()
    moved = dataclasses.replace(
        good, version=PolicyVersion(3, 0), media=(ZeromqMedium(endpoint="tcp://127.0.0.1:1"),)
    )
    check_manifest(moved)
    assert moved.digest == good.digest
    assert chunk_digest(np.zeros(0, dtype=np.uint8)) == blake3(b"").digest()
