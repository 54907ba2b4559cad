"""What a medium is, to a receiver: a way to the chunks of a version or a delta."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.weights.manifest import Blob, Medium

Chunk = tuple[int, NDArray[np.uint8]]
"""A chunk's index, and its bytes: valid until the next one is asked for, and not yet verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a transfer may take, and what ends it early."""

    deadline: float
    """On the clock of time.monotonic."""
    abandoned: threading.Event

    def check(self, waiting_for: str) -> None:
        """Raises WeightTransferError when there is no point in going on."""
        if self.abandoned.is_set():
            raise WeightTransferError(f"abandoned while waiting for {waiting_for}")
        if time.monotonic() > self.deadline:
            raise WeightTransferError(f"out of time while waiting for {waiting_for}")


class WeightReceiver(Protocol):
    """One medium's receiving end. Used by one thread at a time."""

    @property
    def medium(self) -> type[Medium]:
        """The kind of medium that this end understands."""
        ...

    def chunks(
        self, blob: Blob, medium: Medium, indices: Sequence[int], patience: Patience
    ) -> Generator[Chunk, None, None]:
        """Brings each of `indices` once, in any order, or raises WeightTransferError.

        What it brings is to be verified by the caller, who may ask again.
        """
        ...

    def close(self) -> None: ...
