"""Copies between the host and a GPU for which neither waits.

A plain copy to a GPU waits until the GPU has done all that was queued before it, and then the GPU
waits until the host has queued more. From page-locked memory the copy is queued as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(values: NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The host's values on the device, in the order of its queue."""
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and host.numel():
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class HostCopy:
    """A copy of a device's tensor that is on its way to the host."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[Any]:
        """Waits for what was queued before the copy, and for nothing after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[Any] = self._values.tolist()
        return values
