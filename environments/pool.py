"""A fixed number of worker processes for one environment, started again whenever they end.

keeper (one a worker)   starts it, offers it, waits for its end, repeats
borrow                  waits for an idle worker; woken by a keeper or by `release`
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator

from environments.worker_process import EnvironmentSpec, Loaded, Worker
from penstock.errors import EnvironmentFault, PenstockError

_log = logging.getLogger(__name__)

_MIN_RESTART_SECONDS = 1.0
_MAX_RESTART_SECONDS = 30.0
_MIN_CALL_SECONDS = 0.005
_LAST_WORDS_SECONDS = 1.0


class PoolBusy(EnvironmentFault):
    """No worker came free by the deadline."""


class WorkerPool:
    """Lends workers, one borrower at a time each."""

    def __init__(self, spec: EnvironmentSpec, *, num_workers: int, group: asyncio.TaskGroup) -> None:
        self._spec = spec
        self._num_workers = num_workers
        self._group = group
        self._keepers: list[asyncio.Task[None]] = []
        # Holds each worker once: the dead are taken out before their successors start.
        self._idle: asyncio.Queue[Worker] = asyncio.Queue(maxsize=num_workers)

    @property
    def num_workers(self) -> int:
        return self._num_workers

    def start(self) -> asyncio.Future[Loaded]:
        """Starts the first worker, then the others. Done when the first one has built the environment.

        Holds ConfigError if it cannot be built, EnvironmentFault if it dies or hangs.
        """
        loaded: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
        for number in range(self._num_workers):
            keeper = self._keep(number, loaded)
            self._keepers.append(self._group.create_task(keeper, name=f"keeper of worker {number}"))
        return loaded

    def stop(self) -> None:
        """Kills every worker."""
        for keeper in self._keepers:
            keeper.cancel()

    async def borrow(self, seconds: float) -> tuple[Worker, float]:
        """Waits for an idle worker, the caller's until `release`. Also returns the seconds left. Raises PoolBusy."""
        if seconds <= _MIN_CALL_SECONDS:
            raise self._busy(seconds)  # a call in what is left would cost the worker its life
        worker = self._idle_at_once()
        if worker is not None:
            return worker, seconds
        deadline = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds - _MIN_CALL_SECONDS):
                while not (worker := await self._idle.get()).usable:
                    pass
                return worker, deadline - time.monotonic()
        except TimeoutError:
            raise self._busy(seconds) from None

    def _busy(self, seconds: float) -> PoolBusy:
        return PoolBusy(f"none of the {self._num_workers} workers came free within {seconds:.3g} s")

    def _idle_at_once(self) -> Worker | None:
        while not self._idle.empty():
            worker = self._idle.get_nowait()
            if worker.usable:
                return worker
        return None

    @contextlib.asynccontextmanager
    async def borrowed(self, seconds: float) -> AsyncIterator[tuple[Worker, float]]:
        worker, left = await self.borrow(seconds)
        try:
            yield worker, left
        finally:
            self.release(worker)

    def release(self, worker: Worker) -> None:
        if worker.usable:
            self._idle.put_nowait(worker)

    async def _keep(self, number: int, loaded: asyncio.Future[Loaded]) -> None:
        if number > 0:
            await asyncio.wait([loaded])
        pause = _MIN_RESTART_SECONDS
        for start in itertools.count(1):
            name = f"worker {number}.{start}"
            try:
                await self._live(name, loaded)
                _log.warning("%s ended; starting another", name)
                pause = _MIN_RESTART_SECONDS
            except (PenstockError, OSError) as error:
                if not loaded.done():
                    loaded.set_exception(error)
                    return
                _log.error("%s did not start; trying again in %.3g s: %s", name, pause, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MAX_RESTART_SECONDS)

    async def _live(self, name: str, loaded: asyncio.Future[Loaded]) -> None:
        """One process from its start to its end."""
        worker = await Worker.spawn(name)
        output = self._group.create_task(worker.log_output(), name=f"output of {name}")
        try:
            description = await worker.start(self._spec)
            if not loaded.done():
                loaded.set_result(description)
            self._forget_dead()
            self._idle.put_nowait(worker)
            await worker.lives()
        finally:
            worker.kill()
            await worker.ended()
            # A child that escaped may hold it open.
            await asyncio.wait([output], timeout=_LAST_WORDS_SECONDS)
            output.cancel()

    def _forget_dead(self) -> None:
        idle = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for worker in idle:
            if worker.usable:
                self._idle.put_nowait(worker)
