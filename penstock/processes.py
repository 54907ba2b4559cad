"""Child processes: started in a session of their own, stopped in order, never left behind.

They are marked as ours: those that `parent.follow` end with this process, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
from collections.abc import Sequence

from penstock import parent
from penstock.errors import PenstockError

_log = logging.getLogger(__name__)


class Child:
    """A running program. A session of its own keeps the terminal's Ctrl-C from it: its parent passes that on."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    @classmethod
    async def start(cls, name: str, command: Sequence[str], *, capture: bool = False) -> Child:
        """capture: keep standard output for `ready_line`; else it goes where ours goes."""
        process = await asyncio.create_subprocess_exec(
            *command,
            env=parent.marked(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if capture else None,
            start_new_session=True,
        )
        return cls(name, process)

    @property
    def status(self) -> int | None:
        """The exit status; negative for a signal; None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """The exit status, once there is one. Bounded by the life of the process."""
        return await self._process.wait()

    async def wait_at_most(self, seconds: float) -> bool:
        """Whether the process ended within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    async def ready_line(self, prefix: str, *, timeout_seconds: float) -> str | None:
        """What follows `prefix` on the first line of output that begins with it.

        None if the program ends first. Raises PenstockError at the deadline.
        """
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_seconds):
                async for line in self._process.stdout:
                    text = line.decode(errors="replace").strip()
                    if text.startswith(prefix):
                        return text.removeprefix(prefix).strip()
        except TimeoutError:
            raise PenstockError(
                f"{self.name} did not print {prefix!r} within {timeout_seconds:.0f} s of its start"
            ) from None
        return None

    async def stop(self, *, grace_seconds: float) -> int:
        """SIGTERM, then SIGKILL after the grace. Returns the exit status."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            if not await self.wait_at_most(grace_seconds):
                _log.error("%s did not stop within %.0f s of SIGTERM; killing it", self.name, grace_seconds)
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
        return await self._process.wait()


def allow_most_files() -> None:
    """Lets this process open as many files as the system allows it: a connection is one, and 1,024 are soon used up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
