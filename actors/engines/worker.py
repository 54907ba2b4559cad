"""The thread that computes: steps of a decoder, and commands between them."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch

from actors.engines.decoder import Decoder, Emission, Running
from penstock.errors import EngineFault

_log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.5
_RATE_SECONDS = 5.0
_EXIT_SECONDS = 5.0

ResultT = TypeVar("ResultT")


class Outbox(Protocol):
    """Where results go. Called in the compute thread."""

    def deliver(self, emissions: Sequence[Emission]) -> None: ...

    def fail(self, sequences: Sequence[Running], error: Exception) -> None:
        """These sequences end with an error; the engine goes on."""
        ...

    def crash(self, error: Exception) -> None:
        """The thread is dead: nothing that was asked of it will be answered."""
        ...


class Worker:
    """Owns a decoder: prefill, decode, prefill, ... until `stop`.

    A step that raises fails the sequences that it was computing, and the others go on.
    """

    def __init__(self, decoder: Decoder, outbox: Outbox, *, stream_seconds: float) -> None:
        self._decoder = decoder
        self._outbox = outbox
        self._stream_seconds = stream_seconds
        self._commands: queue.SimpleQueue[tuple[Callable[[Decoder], Any], Future[Any]]] = queue.SimpleQueue()
        self._stopping = False
        self._next_tick = time.monotonic() + stream_seconds
        self._history: deque[tuple[float, int]] = deque()
        self.tokens_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()
        # A thread that computes while the interpreter shuts down aborts the process.
        atexit.register(self.stop, _EXIT_SECONDS)

    def call(self, command: Callable[[Decoder], ResultT]) -> Future[ResultT]:
        """Runs a command between two steps. Cancelling the future before that withdraws it."""
        future: Future[ResultT] = Future()
        self._commands.put((command, future))
        if not self._thread.is_alive():
            self._refuse_commands()
        return future

    def stop(self, timeout_seconds: float) -> bool:
        """Ends after the step in progress, and every sequence with ABORTED. False if it hangs."""
        atexit.unregister(self.stop)
        self.call(self._end)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _end(self, decoder: Decoder) -> None:
        self._stopping = True
        self._outbox.deliver(decoder.abort_all())

    def _run(self) -> None:
        # OpenMP and MKL count threads for each thread apart: the process's setting is made this one's.
        torch.set_num_threads(torch.get_num_threads())
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - told to every reader
            _log.exception("the compute thread died")
            self._stopping = True
            self._outbox.crash(error)
        finally:
            self._refuse_commands()

    def _refuse_commands(self) -> None:
        """Answers those that came too late."""
        while not self._commands.empty():
            _, future = self._commands.get()
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineFault("the engine has ended"))

    def _work(self) -> None:
        while not self._stopping:
            self._obey()
            while self._decoder.has_outdated and not self._stopping:
                self._step(self._decoder.recompute)
            if self._decoder.has_work and not self._stopping:
                self._step(self._decoder.prefill)
                self._step(self._decoder.decode)
            self._tick()

    def _obey(self) -> None:
        """Runs the commands that are there; without work, waits a little for one."""
        block = not self._decoder.has_work
        while not self._stopping:
            try:
                command, future = self._commands.get(block=block, timeout=_IDLE_SECONDS)
            except queue.Empty:
                return
            block = False
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(command(self._decoder))
            except Exception as error:  # noqa: BLE001 - whoever called gets it
                future.set_exception(error)

    def _step(self, compute: Callable[[], list[Emission]]) -> None:
        try:
            emissions = compute()
        except Exception as error:  # noqa: BLE001 - told to the readers of what failed
            failed = self._decoder.drop_concerned()
            _log.exception("a step of %d sequences failed", len(failed))
            self._outbox.fail(failed, error)
            return
        if emissions:
            self._outbox.deliver(emissions)

    def _tick(self) -> None:
        now = time.monotonic()
        if now < self._next_tick:
            return
        self._next_tick = now + self._stream_seconds
        emissions = self._decoder.flush()
        if emissions:
            self._outbox.deliver(emissions)
        self._history.append((now, self._decoder.num_sampled))
        while now - self._history[0][0] > _RATE_SECONDS:
            self._history.popleft()
        started, num_before = self._history[0]
        if now > started:
            self.tokens_per_second = (self._decoder.num_sampled - num_before) / (now - started)
