"""The codec: exact on every pattern, few bytes for few changes, and safe against every byte."""

from __future__ import annotations

import contextlib
import itertools
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.delta import (
    FRAME_BYTES,
    ArrivingDelta,
    FrameDecoder,
    FrameEncoder,
    apply_all,
    encode_version,
    frames_of,
)
from penstock.weights.manifest import HostTensor, plan_layout
from penstock.weights.staged import stage
from tests.weight_fixtures import moved, tensor

Bytes = NDArray[np.uint8]

SPECIAL_16 = (
    0x0000,
    0x8000,
    0x0001,
    0x8001,
    0x007F,
    0x7F7F,
    0x7F80,
    0xFF80,
    0x7FC0,
    0x7F81,
    0xFFFF,
    0x7C00,
    0x7E01,
    0x3F80,
)
"""Zeros, subnormals, largest, infinities and NaNs of bf16 and fp16, and one."""
SPECIAL_32 = (
    0x00000000,
    0x80000000,
    0x00000001,
    0x807FFFFF,
    0x7F7FFFFF,
    0x7F800000,
    0xFF800000,
    0x7FC00000,
    0x7F800001,
    0xFFFFFFFF,
    0x3F800000,
)


def encode(old: NDArray, new: NDArray, *, compress: bool = True) -> Bytes:
    return np.frombuffer(FrameEncoder(compress=compress).encode(0, old, new), dtype=np.uint8)


def apply(delta: Bytes, base: NDArray) -> Bytes:
    made = base.view(np.uint8).copy()
    apply_all([delta], made, num_threads=1)
    return made


def assert_exact(old: NDArray, new: NDArray) -> None:
    for compress in (True, False):
        assert np.array_equal(apply(encode(old, new, compress=compress), old), new.view(np.uint8))


def test_a_few_changes_cost_a_few_bytes() -> None:
    old = np.random.default_rng(0).integers(0, 1 << 16, 100_000).astype(np.uint16)
    new = old.copy()
    new[[7, 8, 5_000, 99_999]] += np.array([1, 65535, 2, 4096], dtype=np.uint16)
    delta = encode(old, new)
    (frame,) = frames_of(delta, new.nbytes)
    assert (frame.num_changes, frame.is_dense) == (4, False)
    assert frame.plain_bytes == (4 + (4999 - 8) // 255 + (99_999 - 5001) // 255, 1, 2, 2, 2), (
        "gaps, signs of four changes, two others, one of them a unit more and one a word"
    )
    assert np.array_equal(apply(delta, old), new.view(np.uint8))


def test_equal_versions_cost_nothing() -> None:
    words = np.arange(1000, dtype=np.uint32)
    assert encode(words, words.copy()).size == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_span_with_many_changes_is_sent_whole(dtype: type) -> None:
    old = np.zeros(10_000, dtype=dtype)
    for num_changes, dense in ((1500, False), (1501, True), (9000, True)):
        new = old.copy()
        new[:num_changes] = 1
        delta = encode(old, new)
        assert next(frames_of(delta, new.nbytes)).is_dense is dense
        assert_exact(old, new)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), wide=st.booleans())
def test_every_pattern_is_exact(data: st.DataObject, wide: bool) -> None:
    """Words of every kind, changed to any other, by steps, or not, at any density."""
    dtype, special = (np.uint32, SPECIAL_32) if wide else (np.uint16, SPECIAL_16)
    size = data.draw(st.integers(1, 3000))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    pool = np.concatenate([np.array(special, dtype=dtype), generator.integers(0, 1 << 16, 8).astype(dtype)])
    old = generator.choice(pool, size)
    density = data.draw(st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.16, 1.0]))
    changed = generator.random(size) < density
    steps = generator.choice(np.array([1, -1, 2, -2, 255, -255, 256, -256, 257, -257]), size).astype(dtype)
    new = np.where(
        changed, np.where(generator.random(size) < 0.7, old + steps, generator.choice(pool, size)), old
    )
    assert_exact(old, new.astype(dtype))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_changes_at_the_edges_of_gaps_and_blocks_are_exact(dtype: type) -> None:
    for size in (1, 31, 64, 65, 255, 256, 257, 1023, 20_000):
        for places in (
            [0],
            [size - 1],
            [0, size - 1],
            [size // 2],
            [min(254, size - 1)],
            [min(255, size - 1)],
        ):
            old = np.arange(size).astype(dtype)
            new = old.copy()
            new[places] += 1
            assert_exact(old, new)


@pytest.mark.parametrize("num_units", [0, 7, 8, 253, 254, 255, 256, 509, 510, 511, 1000])
def test_changes_of_more_than_a_unit_are_found_behind_any_number_of_others(num_units: int) -> None:
    old = np.zeros(60_000, dtype=np.uint16)
    for after in (0, 1, 300):
        new = old.copy()
        changed = np.arange(3, 3 + 7 * (num_units + 2 + after), 7)
        new[changed] += 1
        new[changed[num_units : num_units + 2]] = [3, 0x7F80]
        assert next(frames_of(encode(old, new), new.nbytes)).plain_bytes[3:] == (2, 2)
        assert_exact(old, new)


def test_words_that_lie_askew_are_encoded_too() -> None:
    memory = np.random.default_rng(1).integers(0, 256, 4002, dtype=np.uint8)
    old = memory[2:].view(np.uint16)
    new = old.copy()
    new[1::50] += 1
    assert_exact(old, new)


def versions() -> tuple[list[HostTensor], list[HostTensor]]:
    """Of all dtypes, one of them larger than a block, with a change in each."""
    old = [
        tensor("a", (13,), dtype="BF16", seed=1),
        tensor("b", (FRAME_BYTES + 1000,), dtype="F16", seed=2),
        tensor("empty", (0, 5), seed=3),
        tensor("c", (999,), dtype="F32", seed=4),
        tensor("d", (1,), dtype="BF16", seed=5),
    ]
    new = [
        HostTensor(name=each.name, dtype=each.dtype, shape=each.shape, data=each.data.copy()) for each in old
    ]
    for each in new:
        each.data[::5000] ^= 1
    return old, new


def test_a_version_of_several_dtypes_is_cut_into_frames() -> None:
    old, new = (stage(PolicyVersion(1, step), each) for step, each in enumerate(versions()))
    delta = np.frombuffer(encode_version(new.manifest.tensors, old.buffer, new.buffer), dtype=np.uint8)
    frames = list(frames_of(delta, new.manifest.num_bytes))
    assert [frame.width for frame in frames] == [2, 2, 2, 4, 2]
    assert all(frame.offset // FRAME_BYTES == (frame.end - 1) // FRAME_BYTES for frame in frames)
    assert delta.size < 10_000
    assert np.array_equal(apply(delta, old.buffer), new.buffer)


@pytest.mark.parametrize("piece_bytes", [1, 53, 100_000])
def test_a_delta_that_arrives_in_pieces_is_known_block_by_block(piece_bytes: int) -> None:
    old, new = (stage(PolicyVersion(1, step), each) for step, each in enumerate(versions()))
    whole = np.frombuffer(encode_version(new.manifest.tensors, old.buffer, new.buffer), dtype=np.uint8)
    # What is not here yet is anything.
    delta, made = np.full(whole.size, 0xEE, np.uint8), old.buffer.copy()
    arriving, decoder, known = ArrivingDelta(delta, made.size), FrameDecoder(), [0]
    for start in range(0, whole.size, piece_bytes):
        end = min(start + piece_bytes, whole.size)
        delta[start:end] = whole[start:end]
        known.append(arriving.arrived(end))
        decoder.apply([(delta, frame) for frame in arriving.take(known[-1])], made)
        assert np.array_equal(made[: known[-1]], new.buffer[: known[-1]])
    assert known == sorted(known)
    assert known[-1] == made.size
    assert arriving.take(made.size) == []


def test_a_delta_that_ends_within_a_header_is_refused_once_it_is_here() -> None:
    old, delta = good_delta()
    torn = np.concatenate([delta, delta[:20]])
    arriving = ArrivingDelta(torn, old.nbytes)
    arriving.arrived(delta.size + 10)
    with pytest.raises(WeightTransferError, match="ends within a header"):
        arriving.arrived(torn.size)


def good_delta() -> tuple[NDArray[np.uint16], Bytes]:
    generator = np.random.default_rng(3)
    old = generator.integers(0, 1 << 16, 4000).astype(np.uint16)
    new = old.copy()
    new[::37] += 1
    new[5::100] += 9
    new[9::500] ^= 0x5555
    return old, encode(old, new, compress=False)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hostile_bytes_raise_or_stay_within_bounds(data: st.DataObject) -> None:
    """Around the span lie words that nobody may touch."""
    old, delta = good_delta()
    hostile = delta.copy()
    for _ in range(data.draw(st.integers(1, 4))):
        # The header more often than the rest: most of what can go wrong is there.
        end = data.draw(st.sampled_from([60, hostile.size])) - 1
        hostile[data.draw(st.integers(0, end))] = data.draw(st.integers(0, 255))
    hostile = hostile[: data.draw(st.sampled_from([hostile.size, hostile.size // 2]))]
    memory = np.full(3 * old.nbytes, 0xAB, dtype=np.uint8)
    span = memory[old.nbytes : 2 * old.nbytes]
    span[:] = old.view(np.uint8)
    with contextlib.suppress(WeightTransferError):
        apply_all([hostile], span, num_threads=1)
    assert (memory[: old.nbytes] == 0xAB).all()
    assert (memory[2 * old.nbytes :] == 0xAB).all()


@settings(max_examples=200, deadline=None)
@given(garbage=st.binary(min_size=1, max_size=400))
def test_garbage_is_an_error_that_is_expected(garbage: bytes) -> None:
    with pytest.raises(WeightTransferError):
        apply(np.frombuffer(garbage, dtype=np.uint8), np.zeros(2000, dtype=np.uint16))


def test_a_stream_that_would_grow_beyond_its_stated_size_is_refused() -> None:
    old, new = np.zeros(60_000, np.uint16), np.zeros(60_000, np.uint16)
    new[::10] = 1
    delta = encode(old, new).copy()
    (frame,) = frames_of(delta, old.nbytes)
    assert frame.compressed & 1
    stated = struct.unpack_from("<I", delta, 40)
    assert stated == (frame.plain_bytes[0],)
    struct.pack_into("<I", delta, 40, stated[0] + 1)
    with pytest.raises(WeightTransferError, match="does not have the 6001 bytes"):
        apply(delta, old)


def test_a_gap_that_goes_on_behind_the_last_change_is_refused() -> None:
    old, new = np.zeros(4000, np.uint16), np.zeros(4000, np.uint16)
    new[300] = 1
    delta = encode(old, new, compress=False).copy()
    (frame,) = frames_of(delta, old.nbytes)
    assert delta[slice(*frame.edges[:2])].tolist() == [255, 45]
    delta[slice(*frame.edges[:2])] = [45, 255]
    with pytest.raises(WeightTransferError, match="contradicts itself"):
        apply(delta, old)


def test_frames_out_of_order_or_beyond_the_version_are_refused() -> None:
    old, delta = good_delta()
    with pytest.raises(WeightTransferError, match="expected it behind byte 8000"):
        apply(np.concatenate([delta, delta]), np.concatenate([old, old]))
    with pytest.raises(WeightTransferError, match="within the version's 7998"):
        apply(delta, old[:-1])
    with pytest.raises(WeightTransferError, match="ends within a header"):
        apply(delta[:30], old)


def test_tensors_of_other_sizes_have_no_delta() -> None:
    with pytest.raises(ValueError, match="expected the same dtype and size"):
        FrameEncoder().encode(0, np.zeros(4, np.uint16), np.zeros(5, np.uint16))
    with pytest.raises(ValueError, match="expected the same dtype and size"):
        FrameEncoder().encode(0, np.zeros(4, np.uint16), np.zeros(4, np.uint32))


def test_the_layout_of_a_version_does_not_depend_on_the_data() -> None:
    old, new = versions()
    assert plan_layout(old) == plan_layout(new)


def test_programs_that_need_no_deltas_do_not_load_the_codec() -> None:
    source = (
        "import sys, penstock.weights.fetch, penstock.weights.version_log\n"
        "assert not {'numba', 'zstandard', 'penstock.weights.delta'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)


def test_an_installation_that_cannot_be_written_to_compiles_without_a_cache() -> None:
    """As in a container with a read-only file system, whose user has no home."""
    source = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from penstock.weights.delta import FrameEncoder\n"
        "old = np.zeros(100, np.uint16)\n"
        "assert FrameEncoder().encode(0, old, old + np.uint16(1))"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


def test_deltas_one_behind_the_other_are_applied_by_several_threads() -> None:
    contents = [versions()[0]]
    for step in range(3):
        contents.append(moved(contents[-1], step))
    staged = [stage(PolicyVersion(1, step), content) for step, content in enumerate(contents)]
    deltas = [
        np.frombuffer(encode_version(new.manifest.tensors, old.buffer, new.buffer), dtype=np.uint8)
        for old, new in itertools.pairwise(staged)
    ]
    made = staged[0].buffer.copy()
    apply_all(deltas, made, num_threads=2)
    assert np.array_equal(made, staged[-1].buffer)
    with pytest.raises(WeightTransferError):
        apply_all([deltas[0][:-1]], made, num_threads=2)
