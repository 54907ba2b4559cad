"""Runs in vLLM's worker: its own three-phase weight update, fed from shared memory.

The lifecycle is that of vLLM's own backends (start: layerwise reloading begins; update:
`load_weights`; finish: weights are processed again). None of those backends runs on a
CPU, so this one brings the tensors, by the quickest way there is: it maps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from penstock.weights.manifest import SharedMemoryMedium
from penstock.weights.segment import open_segment

BACKEND = "segment"


@dataclass
class SegmentUpdate(WeightTransferUpdateInfo):
    segment: str
    num_bytes: int
    tensors: list[tuple[str, list[int], int, int]]
    """Name, shape, offset, size in bytes."""


class SegmentEngine(WeightTransferEngine[WeightTransferInitInfo, SegmentUpdate]):
    init_info_cls = WeightTransferInitInfo
    update_info_cls = SegmentUpdate

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SegmentUpdate) -> None:
        medium = SharedMemoryMedium(name=update_info.segment, nonce="")
        data = torch.from_numpy(open_segment(medium, update_info.num_bytes).payload)
        self.model.load_weights(
            (name, data[offset : offset + size].view(torch.bfloat16).view(shape))
            for name, shape, offset, size in update_info.tensors
        )

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...


WeightTransferEngineFactory.register_engine(BACKEND, SegmentEngine)


class Extension:
    """vLLM imports the module of the worker's extension, and that is all that is needed here."""
