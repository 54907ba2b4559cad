"""Reads checkpoints, whatever ranks in whatever layout wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from learner.training.adapters import Adapters
from learner.training.blocks import Block, overlap
from learner.training.retention import MANIFEST
from penstock.errors import ConfigError

FORMATS = (1, 2)
"""Of manifests: the second has tensors that are divided by columns too."""


class CheckpointReader:
    """Reads parts of tensors, whichever files they lie in. Memory-mapped: only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        fields = json.loads((path / MANIFEST).read_bytes())
        if fields["format"] not in FORMATS:
            raise ConfigError(
                f"{path}: checkpoint format is {fields['format']}; this program reads {FORMATS[0]} to {FORMATS[-1]}"
            )
        self.tensors: Mapping[str, dict[str, Any]] = fields["tensors"]
        self.adapters = Adapters(**fields["adapters"]) if "adapters" in fields else None
        """What the tensors are, if they aren't the whole policy."""
        self._files = [self._stack.enter_context(safe_open(path / name, "pt")) for name in fields["files"]]

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def block(self, name: str, block: Block) -> torch.Tensor:
        """A part of a tensor; all of a scalar."""
        entry = self.tensors[name]
        if not entry["shape"]:
            scalar: torch.Tensor = self._file_of(name).get_tensor(name)
            return scalar
        whole: torch.Tensor | None = None
        for file, written in zip(self._files, _blocks(entry), strict=True):
            if common := overlap(block, written):
                part = file.get_slice(name)[common[1]]
                if part.shape == tuple(each.stop - each.start for each in block):
                    return part  # type: ignore[no-any-return]
                if whole is None:
                    whole = part.new_empty([each.stop - each.start for each in block])
                whole[common[0]] = part
        return torch.zeros([each.stop - each.start for each in block]) if whole is None else whole

    def _file_of(self, scalar: str) -> Any:
        """One that has it."""
        written = (index for index, rows in enumerate(self.tensors[scalar]["rows"]) if tuple(rows) != (0, 0))
        return self._files[next(written)]

    def full(self, name: str) -> torch.Tensor:
        return self.block(name, tuple(slice(0, size) for size in self.tensors[name]["shape"]))

    def of_rank(self, rank: int, name: str) -> torch.Tensor | None:
        """A tensor that belongs to one rank, such as its RNG; None if that rank did not exist."""
        if rank >= len(self._files) or name not in self._files[rank].keys():  # noqa: SIM118
            return None
        tensor: torch.Tensor = self._files[rank].get_tensor(name)
        return tensor


def _blocks(entry: Mapping[str, Any]) -> list[Block]:
    """Which part of a tensor each file has."""
    shape, rows = entry["shape"], entry["rows"]
    rest = tuple(slice(0, size) for size in shape[1:])
    if "columns" not in entry:
        return [(slice(*each), *rest) for each in rows]
    return [
        (slice(*each), slice(*column), *rest[1:]) for each, column in zip(rows, entry["columns"], strict=True)
    ]
