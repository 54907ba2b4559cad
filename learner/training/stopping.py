"""SIGTERM and SIGINT in a rank: finish or abandon the step, and be gone in time.

A rank may be deep in a collective or a matrix product when the signal comes, where no
Python runs. So the signal's number is written to a pipe the moment it arrives, and a
thread reads it: it sets the flag that the loop looks at between steps, and ends the
process itself if the loop takes longer than the grace period. What is on disk is
consistent at any instant, so abandoning a step loses that step and nothing else.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

_log = logging.getLogger(__name__)

GRACE_SECONDS = 6.0
"""From the signal to the end of the process, at most."""


class StopOnSignal:
    """Set by SIGTERM or SIGINT."""

    def __init__(self, *, grace_seconds: float = GRACE_SECONDS) -> None:
        self._event = threading.Event()
        self._finished = threading.Event()
        self._grace_seconds = grace_seconds

    def is_set(self) -> bool:
        return self._event.is_set()

    def listen(self) -> None:
        """Starts listening. Call it in the main thread, once."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave_it_to_the_thread)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="stop-on-signal", daemon=True).start()

    def finished(self) -> None:
        """The loop has left in order: the grace period no longer applies."""
        self._finished.set()

    def _watch(self, reader: int) -> None:
        number = signal.Signals(os.read(reader, 1)[0])
        _log.info("%s: stopping after this step", number.name)
        self._event.set()
        if not self._finished.wait(self._grace_seconds):
            _log.warning(
                "the step is abandoned: it took longer than the %.0f s of grace", self._grace_seconds
            )
            os._exit(0)


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Python needs a handler for the signal to reach the pipe."""
