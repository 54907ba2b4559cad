"""How penstock's errors travel over gRPC."""

from __future__ import annotations

import contextlib
import logging
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


@contextlib.asynccontextmanager
async def refusals(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Answers one of our errors with its status and its message."""
    try:
        yield
    except tuple(_STATUS) as error:
        _log.info("refused %s: %s", context.peer(), error)
        await context.abort(_STATUS[type(error)], str(error))
