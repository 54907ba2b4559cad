"""Ends a process that makes no progress: stacks are dumped, the reason is logged, the status is 70.

A thread looks at the clock, so that it sees an event loop, a kernel or a lock that never
returns. It cannot run while other code holds the interpreter's lock for good; for that,
faulthandler's own timer, which needs no interpreter, ends the process later, with status 1.
A supervisor starts it again in either case. A process that was itself stopped (SIGSTOP, a
suspended machine) is forgiven the time.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Self

from penstock.errors import NoProgress
from penstock.signals import Stop

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_INTERPRETER_FACTOR = 5.0


class Watchdog:
    """While armed, ends the process unless it is armed anew, or disarmed, in time."""

    def __init__(
        self,
        *,
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
        look_seconds: float = _LOOK_SECONDS,
        guards_interpreter: bool = True,
    ) -> None:
        """guards_interpreter: also sets faulthandler's timer, of which a process has one: let one watchdog do so."""
        self._guards_interpreter = guards_interpreter
        self._end = end
        self._clock = clock
        self._look_seconds = look_seconds
        self._lock = threading.Lock()
        self._what = ""
        self._deadline: float | None = None
        self._seconds = 0.0
        self._looked_at = clock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.disarm()
        self._closed.set()
        self._thread.join(timeout=5.0)

    def arm(self, what: str, seconds: float) -> None:
        """what: that which must end, or happen again, within `seconds`."""
        with self._lock:
            self._what, self._seconds, self._deadline = what, seconds, self._clock() + seconds
        if self._guards_interpreter:
            faulthandler.dump_traceback_later(_INTERPRETER_FACTOR * seconds, exit=True)

    def disarm(self) -> None:
        with self._lock:
            self._deadline = None
        if self._guards_interpreter:
            faulthandler.cancel_dump_traceback_later()

    def look(self) -> None:
        """Looks at the clock once; the thread does so all the time."""
        now = self._clock()
        gap, self._looked_at = now - self._looked_at - self._look_seconds, now
        with self._lock:
            if self._deadline is None:
                return
            if gap > self._look_seconds:
                self._deadline += gap
            overdue = now >= self._deadline
            what, seconds = self._what, self._seconds
        if overdue:
            end_without_progress(f"{what}: nothing for {seconds:.0f} s", end=self._end)

    def _watch(self) -> None:
        while not self._closed.wait(self._look_seconds):
            self.look()


def end_without_progress(reason: str, *, end: Callable[[int], None] = os._exit) -> None:
    """Dumps every thread's stack and ends the process at once."""
    _log.critical("no progress, exiting with status %d: %s", NoProgress.exit_status, reason)
    faulthandler.dump_traceback(all_threads=True)
    end(NoProgress.exit_status)


async def watch_loop(watchdog: Watchdog, stop: Stop, *, seconds: float) -> None:
    """Arms the watchdog again and again, as long as the event loop runs; until the stop."""
    watchdog.arm("the event loop", seconds)
    while not await stop.sleep(1.0):
        watchdog.arm("the event loop", seconds)
