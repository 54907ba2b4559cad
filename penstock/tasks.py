"""What task groups need beyond asyncio's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from penstock.errors import PenstockError
from penstock.signals import Stop

ResultT = TypeVar("ResultT")


@contextlib.asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup that raises one of our errors as itself, not wrapped in a group."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        known = group.subgroup(PenstockError)
        if known is None:
            raise
        raise _first(known) from group


async def unless_stopped(work: Coroutine[Any, Any, ResultT], stop: Stop, *, name: str) -> ResultT | None:
    """The result of `work`, or None if the stop comes first; then `work` is cancelled."""
    working = asyncio.create_task(work, name=name)
    stopping = asyncio.create_task(stop.wait(), name=f"{name}, until stopped")
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait((working, stopping))


def _first(group: BaseExceptionGroup[PenstockError]) -> PenstockError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, PenstockError)
    return error
