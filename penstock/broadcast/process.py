"""A member's process, to who started it. Imports no torch.

A group's communication has a process of its own on each side, which lives as long as the group:
whatever a collective is stuck in, killing the process ends it, and neither trainer nor engine has
a thread, a lock or a CUDA context in it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from penstock import parent
from penstock.broadcast.words import Event, EventKind, Formation, Sending, Settings

_log = logging.getLogger(__name__)


class Member(Protocol):
    def tell(self, command: Formation | Sending) -> None:
        """To a sender. A process that has ended does not hear it; ENDED tells."""
        ...

    def kill(self) -> None:
        """At once, from any thread. May be called twice."""
        ...


class StartMember(Protocol):
    def __call__(self, settings: Settings, on_event: Callable[[Event], None]) -> Member: ...


class MemberProcess:
    """Start it in a thread that lives as long as the program, best the main one: Linux ends the child with it."""

    def __init__(self, settings: Settings, on_event: Callable[[Event], None]) -> None:
        """on_event: called in a thread of its own, for ENDED last."""
        self._on_event = on_event
        self._process = subprocess.Popen(
            [sys.executable, "-m", "penstock.broadcast"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Of waits that end without news torch warns, each time; of errors it raises.
            env=parent.marked({"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}),
            start_new_session=True,
        )
        # Not as an argument: every user of the host may read those, and the group's name is a secret.
        self._say(settings)
        self._reader = threading.Thread(target=self._read, name="read a broadcast's events", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, command: Formation | Sending) -> None:
        self._say(command)

    def kill(self) -> None:
        self._process.kill()

    def _say(self, line: Settings | Formation | Sending) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(line.to_line() + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        for line in self._process.stdout:
            try:
                event = Event.from_line(line)
            except (ValueError, TypeError):
                _log.warning("a line of a broadcast's process is no event: %s", line.strip()[:200])
                continue
            self._on_event(event)
        # Its output is closed: it ends, or ended. What does not is killed.
        try:
            status = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._on_event(Event(kind=EventKind.ENDED, message=f"its process ended with status {status}"))
