"""Versions made of a base and low-rank factors: the same bytes on both sides, and the base sent once."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.codec import manifest_from_wire, manifest_to_wire
from penstock.errors import ProtocolError
from penstock.trajectory import PolicyVersion
from penstock.weights.adapted_log import AdaptedLog
from penstock.weights.adapters import LowRank, merge, merge_matrix, pack_factors, unpack_factors
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import (
    AdapterUpdate,
    Factor,
    HostTensor,
    Manifest,
    SharedMemoryMedium,
    ZeromqMedium,
    pack,
    plan_layout,
)
from penstock.weights.media.zeromq import ZeromqReceiver, ZeromqServer
from tests.weight_fixtures import CHUNK, ObservedReceiver, flip_byte

SHAPES = {"up": (37, 129), "down": (129, 37)}
RANK = 3
SCALE = 2.0 / 3.0


def base_tensors(dtype: str) -> list[HostTensor]:
    """Two matrices that get factors, between others that don't."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding": (83, 37), "up": SHAPES["up"], "norm": (37,), "down": SHAPES["down"], "tail": (5,)}
    found = []
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator).to(_torch_dtype(dtype))
        data = values.reshape(-1).view(torch.uint8).numpy()
        found.append(HostTensor(name=name, dtype=dtype, shape=shape, data=data))
    return found


def factors(seed: int) -> list[LowRank]:
    draw = np.random.default_rng(seed)
    return [
        LowRank(
            factor=Factor(tensor=name, rank=RANK, scale=SCALE),
            b=draw.normal(size=(rows, RANK)).astype(np.float32) * 0.1,
            a=draw.normal(size=(RANK, columns)).astype(np.float32),
        )
        for name, (rows, columns) in SHAPES.items()
    ]


def expected_tensors(dtype: str, seed: int) -> dict[str, np.ndarray]:
    """By whole arrays, one rank after another: the definition, written differently."""
    found = {}
    parts = {part.factor.tensor: part for part in factors(seed)}
    for each in base_tensors(dtype):
        values = torch.from_numpy(each.data).view(_torch_dtype(dtype)).view(each.shape)
        if each.name in parts:
            part = parts[each.name]
            total = np.zeros(each.shape, dtype=np.float32)
            for rank in range(RANK):
                total += part.b[:, rank : rank + 1] * part.a[rank : rank + 1]
            values = torch.from_numpy(values.float().numpy() + np.float32(SCALE) * total).to(values.dtype)
        found[each.name] = values.reshape(-1).view(torch.uint8).numpy()
    return found


def _torch_dtype(dtype: str) -> torch.dtype:
    return {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]


def assert_is(manifest: Manifest, buffer: np.ndarray, dtype: str, seed: int) -> None:
    for name, expected in expected_tensors(dtype, seed).items():
        (entry,) = [entry for entry in manifest.tensors if entry.name == name]
        assert np.array_equal(buffer[entry.offset : entry.offset + entry.num_bytes], expected), name


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_merging_rounds_as_the_definition_says_and_leaves_the_rest(dtype: str) -> None:
    content = base_tensors(dtype)
    entries, num_bytes = plan_layout(content)
    base = np.empty(num_bytes, dtype=np.uint8)
    pack(base, entries, content)
    out = np.full_like(base, 7)
    merge(base, entries, factors(1), out)
    for entry in entries:
        expected = expected_tensors(dtype, 1)[entry.name]
        assert np.array_equal(out[entry.offset : entry.offset + entry.num_bytes], expected), entry.name
    gaps = np.ones(num_bytes, dtype=bool)
    for entry in entries:
        gaps[entry.offset : entry.offset + entry.num_bytes] = False
    assert not out[gaps].any()


def test_one_matrix_is_merged_as_all_are_and_as_its_product_is() -> None:
    (up, _), base = factors(1), np.ones(SHAPES["up"], dtype=np.float32)
    merged = merge_matrix(base, up)
    assert merged == pytest.approx(base + SCALE * (up.b @ up.a), abs=1e-6)


def test_factors_survive_packing() -> None:
    entries, _ = plan_layout(base_tensors("F32"))
    parts = factors(2)
    back = unpack_factors(pack_factors(parts), [part.factor for part in parts], entries)
    for got, wanted in zip(back, parts, strict=True):
        assert got.factor == wanted.factor
        assert np.array_equal(got.a, wanted.a)
        assert np.array_equal(got.b, wanted.b)


class Wire:
    """A learner's log, the coordinator's server, and a receiver on another host."""

    def __init__(self, dtype: str) -> None:
        self.log = AdaptedLog(name_prefix=f"penstock-test-{secrets.token_hex(4)}", chunk_bytes=CHUNK)
        self.log.write_base(PolicyVersion(1, 0), base_tensors(dtype))
        self.server = ZeromqServer("tcp://127.0.0.1:0")
        self.receiver = ObservedReceiver(ZeromqReceiver())
        self.fetcher = WeightFetcher([self.receiver])

    def publish(self, step: int) -> Manifest:
        """As an actor on another host is told of it."""
        manifest = self.log.write(PolicyVersion(1, step), factors(step))
        self.server.add(manifest)
        remote = dataclasses.replace(manifest, media=(ZeromqMedium(endpoint=self.server.endpoint),))
        return manifest_from_wire(manifest_to_wire(remote))

    def close(self) -> None:
        self.server.close()
        self.fetcher.close()
        self.log.close()


@pytest.fixture(params=["F32", "BF16"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    with closing(Wire(request.param)) as wire:
        wire.dtype = request.param  # type: ignore[attr-defined]
        yield wire


def test_the_base_travels_once_and_then_the_factors_alone(wire: Wire) -> None:
    dtype: str = wire.dtype  # type: ignore[attr-defined]
    for step in range(6):
        manifest = wire.publish(step)
        assert manifest.adapter is not None
        wire.receiver.asked.clear()
        staged = wire.fetcher.fetch(manifest, timeout_seconds=30)
        assert_is(staged.manifest, staged.buffer, dtype, step)
        base, own = (len(each.chunk_digests) for each in (manifest.adapter.base, manifest.adapter))
        assert len(wire.receiver.asked) == (base + own if step == 0 else own)
    assert manifest.adapter.num_bytes == 2 * RANK * (37 + 129) * 4


def test_an_actor_of_the_learners_host_maps_the_version_whole(wire: Wire) -> None:
    manifest = wire.log.write(PolicyVersion(1, 1), factors(1))
    fetcher = WeightFetcher()
    staged = fetcher.fetch(manifest, timeout_seconds=30, in_place=True)
    assert_is(manifest, staged.buffer, wire.dtype, 1)  # type: ignore[attr-defined]


def test_a_base_that_is_corrupt_in_an_actors_memory_is_found_and_the_version_fetched_whole(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    wire.fetcher.fetch(wire.publish(0), timeout_seconds=30)
    wire.fetcher._adapting._base._data[4000] ^= 1
    staged = wire.fetcher.fetch(wire.publish(1), timeout_seconds=30)
    assert "factors did not make version 1.1 of its base: 1 chunks differ" in caplog.text
    assert_is(staged.manifest, staged.buffer, wire.dtype, 1)  # type: ignore[attr-defined]


def test_factors_that_are_corrupt_at_the_learner_are_refused_and_the_version_fetched_whole(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = wire.publish(1)
    assert isinstance(manifest.adapter, AdapterUpdate)
    flip_byte(manifest.adapter.segment.name, 17)
    staged = wire.fetcher.fetch(manifest, timeout_seconds=30)
    assert "arrived with another digest; fetching the version whole" in caplog.text
    assert_is(staged.manifest, staged.buffer, wire.dtype, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"factors": (Factor(tensor="norm", rank=1, scale=1.0),)}, "expected matrices of the manifest"),
        ({"factors": (Factor(tensor="none", rank=1, scale=1.0),)}, "expected matrices of the manifest"),
        ({"factors": (Factor(tensor="up", rank=0, scale=1.0),)}, "has rank 0"),
        ({"factors": (Factor(tensor="up", rank=2, scale=float("nan")),)}, "scale nan"),
        ({"factors": (Factor(tensor="up", rank=2, scale=1.0),)}, "factors of version 1.1 have"),
    ],
)
def test_a_manifest_whose_factors_do_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    with closing(Wire("F32")) as wire:
        manifest = wire.publish(1)
    assert manifest.adapter is not None
    adapter = dataclasses.replace(manifest.adapter, **changed)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match=message):
        manifest_from_wire(manifest_to_wire(dataclasses.replace(manifest, adapter=adapter)))


def test_closing_leaves_no_segment_behind() -> None:
    wire = Wire("F32")
    manifest = wire.publish(0)
    assert manifest.adapter is not None
    (medium,) = wire.log.write(PolicyVersion(1, 1), factors(1)).media
    wire.close()
    assert isinstance(medium, SharedMemoryMedium)
    for name in (medium.name, manifest.adapter.segment.name, manifest.adapter.base.segment.name):
        assert not (Path("/dev/shm") / name).exists()
