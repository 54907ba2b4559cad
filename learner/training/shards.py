"""What changed since the version published last, found by each rank in its own shard.

So what crosses the ranks at a publication is about a hundredth of the weights. Each rank keeps
its part of the last version as it was published, and rank 0 merges the deltas of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor, Replicate, Shard

from learner.training.parallel import Ranks
from penstock.weights.manifest import DTYPE_BYTES, plan_shapes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """This rank's part of one tensor."""

    offset: int
    """In the packed version, in bytes."""
    width: int
    """Bytes an element."""
    data: NDArray[np.uint8]


class ShardDeltas:
    """This rank's part of the version published last."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._published: list[Piece] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the next version can be told as a delta. The same on every rank."""
        return self._published is not None

    def remember(self, tensors: Iterable[tuple[str, torch.Tensor]], dtype: str) -> None:
        """Notes the version that is published now, if its shards are such that one can tell where they lie.

        tensors: by name, in the order of publication, in the dtype that is published.
        """
        named = list(tensors)
        # A stage has other tensors than the next: where they lie in the version, it cannot tell.
        alike = self._ranks.world_size > 1 and self._ranks.pipeline is None
        divided = alike and all(_rows_of(tensor) is not None for _, tensor in named)
        self._published = self._pieces(named, dtype) if divided else None

    def forget(self) -> None:
        self._published = None

    def gather(self, tensors: Iterable[tuple[str, torch.Tensor]], dtype: str) -> NDArray[np.uint8]:
        """The delta from what is remembered; then the new version is. A collective. Only rank 0's is whole."""
        from penstock.weights.delta import FrameEncoder, cut, merge

        assert self._published is not None
        pieces = self._pieces(list(tensors), dtype)
        encoder = FrameEncoder()
        frames = []
        for old, new in zip(self._published, pieces, strict=True):
            for where, words in cut(new.offset, new.offset + new.data.size, new.width):
                local = slice(where.start - new.offset, where.stop - new.offset)
                frames.append(
                    encoder.encode(where.start, old.data[local].view(words), new.data[local].view(words))
                )
        self._published = pieces
        return merge(self._ranks.gather_bytes(b"".join(frames)))

    def _pieces(self, named: list[tuple[str, torch.Tensor]], dtype: str) -> list[Piece]:
        entries, _ = plan_shapes((name, dtype, tuple(tensor.shape)) for name, tensor in named)
        width = DTYPE_BYTES[dtype]
        pieces = []
        for entry, (_, tensor) in zip(entries, named, strict=True):
            rows = _rows_of(tensor)
            assert rows is not None
            start, local = rows
            if local.numel() and self._is_mine(tensor):
                row_bytes = entry.num_bytes // max(1, tensor.shape[0] if tensor.dim() else 1)
                # A copy: the tensor may be the parameter itself, which goes on changing.
                data = local.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().copy()
                pieces.append(Piece(offset=entry.offset + start * row_bytes, width=width, data=data))
        return pieces

    def _is_mine(self, tensor: torch.Tensor) -> bool:
        """Of several ranks that hold the same rows, the first tells what changed in them."""
        if not isinstance(tensor, DTensor):
            return self._ranks.is_first
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        return all(
            place == 0
            for place, placement in zip(coordinate, tensor.placements, strict=True)
            if isinstance(placement, Replicate)
        )


def _rows_of(tensor: torch.Tensor) -> tuple[int, torch.Tensor] | None:
    """The first row that this rank holds, and its rows; None for a tensor that is not divided by rows alone."""
    if not isinstance(tensor, DTensor):
        return 0, tensor
    divided = [
        dimension for dimension, each in enumerate(tensor.placements) if not isinstance(each, Replicate)
    ]
    if not divided:
        return 0, tensor.to_local()
    placement = tensor.placements[divided[0]]
    if len(divided) > 1 or type(placement) is not Shard or placement.dim != 0:
        return None
    mesh = tensor.device_mesh
    # As torch.chunk divides: all but the last parts are of the same size.
    rows = -(-tensor.shape[0] // mesh.size(divided[0]))
    return min(rows * mesh.get_local_rank(divided[0]), tensor.shape[0]), tensor.to_local()
