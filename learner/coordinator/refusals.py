"""How penstock's errors travel over gRPC."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc

from penstock.errors import (
    ConfigError,
    FleetFull,
    LedgerError,
    PeerLost,
    ProtocolError,
    SequenceGap,
    SessionFenced,
    WeightTransferError,
)

_log = logging.getLogger(__name__)

_STATUS = {
    SequenceGap: grpc.StatusCode.DATA_LOSS,
    SessionFenced: grpc.StatusCode.ABORTED,
    FleetFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    PeerLost: grpc.StatusCode.FAILED_PRECONDITION,
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    # The process is about to end: what was not acknowledged is to be sent to its successor.
    LedgerError: grpc.StatusCode.UNAVAILABLE,
    WeightTransferError: grpc.StatusCode.INTERNAL,
}


LINE_SECONDS = 1.0


class Refused:
    """Counts refused calls, and logs one in a while of each kind: strangers may call thousands of times a second."""

    def __init__(self) -> None:
        self.by_status: Counter[str] = Counter()
        """Since the process started."""
        self._logged_at: dict[str, float] = {}

    def note(self, status: grpc.StatusCode, peer: str, error: Exception, now: float) -> None:
        self.by_status[status.name] += 1
        if now - self._logged_at.get(status.name, -LINE_SECONDS) >= LINE_SECONDS:
            self._logged_at[status.name] = now
            _log.info("refused %s (%d %s so far): %s", peer, self.by_status[status.name], status.name, error)


refused = Refused()


@contextlib.asynccontextmanager
async def refusals(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Answers one of our errors with its status and its message."""
    try:
        yield
    except tuple(_STATUS) as error:
        refused.note(_STATUS[type(error)], context.peer(), error, time.monotonic())
        await context.abort(_STATUS[type(error)], str(error))
