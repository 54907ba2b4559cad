"""One buffer from rank 0 to all others, piece by piece: gloo from host memory, NCCL through a device.

Each wait has a deadline, a piece's. It is enforced here where that is possible, and by whoever
started this process where a library does not return.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch._C import _distributed_c10d as c10d

from penstock.broadcast.words import Backend

# The trainer's segment is mapped for reading. torch warns that it cannot say so of a tensor; rank 0 only reads.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Moved = Callable[[int], None]
"""Told how many bytes have been sent, or have arrived."""
NUM_SLOTS = 3
"""Pieces on their way through a device at once."""
_POLL_SECONDS = 0.0001


class Overdue(Exception):
    """A piece took too long."""


class Pieces(Protocol):
    def broadcast(self, payload: NDArray[np.uint8], moved: Moved) -> None:
        """payload: [num_bytes] uint8, what rank 0 sends, and where the others have it arrive.

        Raises Overdue, or RuntimeError where the other end is gone.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This process in its group."""

    store: c10d.Store
    rank: int
    size: int
    device: torch.device
    address: str
    """Of this host, for the group's connections."""
    piece_bytes: int
    timeout_seconds: float
    forming_seconds: float
    check: Callable[[], None]
    """Raises when there is no point in waiting any longer."""


def join(backend: Backend, place: Place) -> Pieces:
    """Waits for all members. Raises Overdue, or RuntimeError."""
    pieces = GlooPieces(place) if backend is Backend.GLOO else NcclPieces(place)
    # NCCL makes its communicator only now.
    pieces.broadcast(np.zeros(1, dtype=np.uint8), lambda _: None)
    return pieces


def _cut(num_bytes: int, piece_bytes: int) -> Iterator[slice]:
    return (slice(at, min(at + piece_bytes, num_bytes)) for at in range(0, num_bytes, piece_bytes))


def _options(place: Place) -> c10d.BroadcastOptions:
    options = c10d.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    options.timeout = timedelta(seconds=place.timeout_seconds)
    return options


class GlooPieces:
    """On CPUs. Pieces are read and written where they lie."""

    def __init__(self, place: Place) -> None:
        self._place = place
        options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=place.forming_seconds)
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=place.address)]
        self._group: Any = c10d.ProcessGroupGloo(place.store, place.rank, place.size, options)

    def broadcast(self, payload: NDArray[np.uint8], moved: Moved) -> None:
        options, timeout = _options(self._place), timedelta(seconds=self._place.timeout_seconds)
        for where in _cut(payload.size, self._place.piece_bytes):
            started = time.monotonic()
            try:
                self._group.broadcast([torch.from_numpy(payload[where])], options).wait(timeout)
            except RuntimeError as error:
                if time.monotonic() - started >= 0.9 * self._place.timeout_seconds:
                    raise Overdue(f"a piece took more than {self._place.timeout_seconds:.1f} s") from error
                raise
            moved(where.stop)


@dataclass(slots=True, kw_only=True)
class _Slot:
    """A piece's place on the device, and the page-locked host memory that it comes from, or goes to."""

    device: torch.Tensor
    host: torch.Tensor
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    event: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    where: slice | None = None
    """Of the piece that is on its way."""


class NcclPieces:
    """On GPUs. While one piece is copied, another is broadcast."""

    def __init__(self, place: Place) -> None:
        self._place = place
        _prepare_environment(place)
        device = torch.device("cuda", place.device.index or 0)
        torch.cuda.set_device(device)
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=place.forming_seconds)
        self._group: Any = c10d.ProcessGroupNCCL(place.store, place.rank, place.size, options)
        self._timeout_seconds = place.forming_seconds
        """Of the next piece: the first one waits for the communicator to be made."""
        self._slots = [
            _Slot(
                device=torch.empty(place.piece_bytes, dtype=torch.uint8, device=device),
                host=torch.empty(place.piece_bytes, dtype=torch.uint8, pin_memory=True),
            )
            for _ in range(NUM_SLOTS)
        ]

    def broadcast(self, payload: NDArray[np.uint8], moved: Moved) -> None:
        target = torch.from_numpy(payload)
        for number, where in enumerate(_cut(payload.size, self._place.piece_bytes)):
            slot = self._slots[number % NUM_SLOTS]
            self._finish(slot, target, moved)
            self._start(slot, target, where)
        for slot in sorted(self._slots, key=lambda slot: -1 if slot.where is None else slot.where.start):
            self._finish(slot, target, moved)
        self._timeout_seconds = self._place.timeout_seconds

    def _start(self, slot: _Slot, target: torch.Tensor, where: slice) -> None:
        size = where.stop - where.start
        piece, sends = slot.device[:size], self._place.rank == 0
        if sends:
            slot.host[:size].copy_(target[where])
        with torch.cuda.stream(slot.stream):
            if sends:
                piece.copy_(slot.host[:size], non_blocking=True)
            self._group.broadcast([piece], _options(self._place)).wait()
            if not sends:
                slot.host[:size].copy_(piece, non_blocking=True)
            slot.event.record(slot.stream)
        slot.where = where

    def _finish(self, slot: _Slot, target: torch.Tensor, moved: Moved) -> None:
        """Waits for the piece that is on its way in a slot, if there is one."""
        where = slot.where
        if where is None:
            return
        overdue_at = time.monotonic() + self._timeout_seconds
        while not slot.event.query():  # type: ignore[no-untyped-call]
            self._place.check()
            if time.monotonic() > overdue_at:
                raise Overdue(f"a piece took more than {self._timeout_seconds:.1f} s")
            time.sleep(_POLL_SECONDS)
        slot.where = None
        if self._place.rank != 0:
            target[where].copy_(slot.host[: where.stop - where.start])
        moved(where.stop)


def _prepare_environment(place: Place) -> None:
    """What NCCL and torch read when the first communicator is made."""
    if place.address.startswith("127.") or place.address == "::1":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    # Errors and timeouts are noticed here: torch's own watchdog would end the process before it could tell of them.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
