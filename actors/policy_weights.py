"""A policy folder's own weights, staged for an engine without a learner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from penstock.errors import ConfigError
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import HostTensor
from penstock.weights.staged import StagedWeights, stage

_HEADER_BYTES = 8
_MAX_HEADER_BYTES = 100 * 1024 * 1024


def stage_policy(folder: Path, version: PolicyVersion) -> StagedWeights:
    """Packs every tensor of the folder's safetensors files. Raises ConfigError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"policy {folder}: holds no *.safetensors file; expected the model's weights")
    return stage(version, [tensor for file in files for tensor in _tensors(file)])


def _tensors(path: Path) -> Iterator[HostTensor]:
    """The file's tensors, mapped. The format: 8 bytes of length, a JSON header, the data."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    length = int(data[:_HEADER_BYTES].view("<u8")[0]) if data.size >= _HEADER_BYTES else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, data.size - _HEADER_BYTES):
        raise ConfigError(f"{path}: is not a safetensors file")
    start = _HEADER_BYTES + length
    try:
        header = json.loads(data[_HEADER_BYTES:start].tobytes())
    except ValueError as error:
        raise ConfigError(f"{path}: its header is not JSON: {error}") from error
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield HostTensor(
                name=name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                data=data[start + begin : start + end],
            )
