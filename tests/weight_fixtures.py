"""Small versions to publish, and receivers that count or interfere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from penstock.weights.manifest import Blob, HostTensor, Medium
from penstock.weights.media.base import Chunk, Patience, WeightReceiver
from penstock.weights.segment import segment_path
from penstock.weights.staged import StagedWeights

CHUNK = 4096
"""Small chunks, so that small versions have many."""


def tensor(name: str, shape: tuple[int, ...], *, dtype: str = "F32", seed: int = 0) -> HostTensor:
    element = {"F32": 4, "BF16": 2, "F16": 2}[dtype]
    size = element * int(np.prod(shape, dtype=np.int64))
    data = np.random.default_rng(seed).integers(0, 256, size=size, dtype=np.uint8)
    return HostTensor(name=name, dtype=dtype, shape=shape, data=data)


def tensors(*, seed: int = 0) -> list[HostTensor]:
    """Odd sizes: nothing is a multiple of anything. About nine chunks."""
    return [
        tensor("scalar", (), seed=seed),
        tensor("bias", (13,), dtype="BF16", seed=seed + 1),
        tensor("matrix", (91, 83), seed=seed + 2),
        tensor("half", (7, 3, 5), dtype="F16", seed=seed + 3),
        tensor("tail", (1, 999), dtype="BF16", seed=seed + 4),
    ]


def moved(content: Sequence[HostTensor], step: int) -> list[HostTensor]:
    """The tensors after an optimiser's step: in each of them an element or two one unit further."""
    after = []
    for each in content:
        data = each.data.copy()
        words = data.view({"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}[each.dtype])
        words[step % 7 :: 997] += 1
        after.append(HostTensor(name=each.name, dtype=each.dtype, shape=each.shape, data=data))
    return after


def assert_holds(staged: StagedWeights, expected: Sequence[HostTensor]) -> None:
    assert [entry.name for entry in staged.manifest.tensors] == [each.name for each in expected]
    for entry, each in zip(staged.manifest.tensors, expected, strict=True):
        held = staged.buffer[entry.offset : entry.offset + entry.num_bytes]
        assert np.array_equal(held, each.data), entry.name


def flip_byte(name: str, offset: int) -> None:
    """Corrupts a segment's payload, behind everybody's back."""
    path = segment_path(name)
    assert path is not None
    with Path(path).open("r+b") as file:
        file.seek(64 + offset)
        byte = file.read(1)
        file.seek(64 + offset)
        file.write(bytes([byte[0] ^ 1]))


class ObservedReceiver:
    """Counts the chunks that are asked for, and calls `before` ahead of each that arrives."""

    def __init__(self, inner: WeightReceiver, before: Callable[[int], None] | None = None) -> None:
        self._inner = inner
        self._before = before
        self.asked: list[int] = []

    @property
    def medium(self) -> type[Medium]:
        return self._inner.medium

    def chunks(
        self, blob: Blob, medium: Medium, indices: Sequence[int], patience: Patience
    ) -> Iterator[Chunk]:
        self.asked.extend(indices)
        for number, chunk in enumerate(self._inner.chunks(blob, medium, indices, patience)):
            if self._before is not None:
                self._before(number)
            yield chunk

    def close(self) -> None:
        self._inner.close()
