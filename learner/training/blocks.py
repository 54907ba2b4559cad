"""Where a rank's part of a tensor lies in the whole: a range of each of its dimensions.

Tensor parallelism divides a matrix by rows or by columns; FSDP2 then divides by rows what
each rank got of it. So a part is always one block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, Replicate

Block = tuple[slice, ...]
"""One slice a dimension, with a start and a stop."""


def block_of(tensor: torch.Tensor, rank: int) -> Block:
    """What a rank of the trainer holds of a tensor. All of it, where it is not divided."""
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        # The mesh's last dimension divides first.
        for size, place, placement in reversed(
            list(zip(mesh.shape, _coordinate(tensor, rank), tensor.placements, strict=True))
        ):
            dim = getattr(placement, "dim", None)
            if dim is not None:
                start, stop = bounds[dim]
                bounds[dim] = _chunk(start, stop, size, place)
    return tuple(slice(*each) for each in bounds)


def is_copy(tensor: torch.Tensor, rank: int) -> bool:
    """Whether a rank before this one holds the same part."""
    if not isinstance(tensor, DTensor):
        return rank > 0
    places = zip(_coordinate(tensor, rank), tensor.placements, strict=True)
    return any(place > 0 for place, placement in places if isinstance(placement, Replicate))


def overlap(block: Block, other: Block) -> tuple[Block, Block] | None:
    """What two blocks have in common, as a part of each; None if it is nothing."""
    common = [
        slice(max(one.start, two.start), min(one.stop, two.stop))
        for one, two in zip(block, other, strict=True)
    ]
    if any(each.start >= each.stop for each in common):
        return None
    return _within(common, block), _within(common, other)


def _within(common: Sequence[slice], block: Block) -> Block:
    pairs = zip(common, block, strict=True)
    return tuple(slice(part.start - whole.start, part.stop - whole.start) for part, whole in pairs)


def _chunk(start: int, stop: int, size: int, place: int) -> tuple[int, int]:
    """As torch.chunk divides: all but the last parts are of the same size."""
    share = -(-(stop - start) // size)
    return min(start + place * share, stop), min(start + (place + 1) * share, stop)


def _coordinate(tensor: DTensor, rank: int) -> list[int]:
    coordinate: list[int] = (tensor.device_mesh.mesh == rank).nonzero()[0].tolist()
    return coordinate
