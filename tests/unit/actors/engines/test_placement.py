"""Bytes of a version, in the places that another layout has for them."""

from __future__ import annotations

import numpy as np
import pytest

from actors.engines.placement import Placement
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import CHUNK_BYTES, HostTensor
from penstock.weights.staged import StagedWeights, stage


def staged(*sizes: int) -> StagedWeights:
    generator = np.random.default_rng(len(sizes))
    return stage(
        PolicyVersion(1, 0),
        [
            HostTensor(
                name=f"t{index}",
                dtype="F32",
                shape=(size,),
                data=generator.integers(0, 256, size=4 * size, dtype=np.uint8),
            )
            for index, size in enumerate(sizes)
        ],
    )


def names(version: StagedWeights) -> dict[str, str]:
    return {entry.name: entry.name for entry in version.manifest.tensors}


def test_tensors_are_written_where_the_layout_has_them() -> None:
    version = staged(3, 2)
    first, second = version.manifest.tensors
    placement = Placement.of(
        version.manifest.tensors,
        [(second.offset, 0, 8), (first.offset, 8, 4), (first.offset + 4, 20, 8)],
        28,
    )
    segment = np.zeros(28, dtype=np.uint8)
    digest = placement.write(version, names(version), segment)
    assert digest == version.manifest.digest
    assert segment[:8].tobytes() == version.buffer[second.offset :].tobytes()
    assert segment[20:28].tobytes() == version.buffer[4:12].tobytes()


def test_the_digest_is_that_of_what_lies_in_the_segment_over_many_chunks() -> None:
    version = staged(CHUNK_BYTES // 4 + 5, 7, CHUNK_BYTES // 2, 1)
    end, rows = 0, []
    for entry in reversed(version.manifest.tensors):
        rows.append((entry.offset, end, entry.num_bytes))
        end += entry.num_bytes
    placement = Placement.of(version.manifest.tensors, rows, end)
    segment = np.zeros(end, dtype=np.uint8)
    assert placement.write(version, names(version), segment) == version.manifest.digest


@pytest.mark.parametrize("place", [0, 4, 11])
def test_a_byte_that_is_not_as_it_should_be_changes_the_digest(place: int) -> None:
    version = staged(3)
    placement = Placement.of(version.manifest.tensors, [(0, 0, 12)], 12)

    class Faulty(np.ndarray):
        def __setitem__(self, where: object, value: object) -> None:
            super().__setitem__(where, value)
            self.view(np.ndarray)[place] ^= 1

    segment = np.zeros(12, dtype=np.uint8).view(Faulty)
    assert placement.write(version, names(version), segment) != version.manifest.digest


def test_a_name_of_a_tied_tensor_stands_for_the_one_that_is_placed() -> None:
    version = staged(2)
    placement = Placement.of(version.manifest.tensors, [(0, 0, 8)], 8)
    twin = stage(
        PolicyVersion(1, 1),
        [
            HostTensor(name=name, dtype="F32", shape=(2,), data=version.buffer.copy())
            for name in ("t0", "tied")
        ],
    )
    digest = placement.write(twin, {"t0": "t0", "tied": "t0"}, np.zeros(8, dtype=np.uint8))
    assert digest == twin.manifest.digest
