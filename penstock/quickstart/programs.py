"""The programs of a run on this machine: started, watched, and stopped together.

Each has its output in a log file of its own. One that ends unasked is a ProgramDied,
which names it and shows the end of its log; leaving the context stops the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock import parent
from penstock.errors import PenstockError

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_CLIENT_GRACE_SECONDS = 4.0
_SERVER_GRACE_SECONDS = 5.5
_NUM_LOG_LINES = 15
_ENVIRONMENT = {
    # One core a program: spinning thread pools on shared cores cost far more than they give.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


class ProgramDied(PenstockError):
    """A program ended that should run, or ended with a failure."""


@dataclass(slots=True, kw_only=True)
class Program:
    name: str
    log: Path
    process: asyncio.subprocess.Process
    may_finish: bool
    """Ending with status 0 is in order."""
    is_client: bool
    """It talks to the others, and so is stopped before them."""
    killed: bool = False
    """Ended on purpose."""

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None

    def check(self) -> None:
        """Raises ProgramDied."""
        status = self.process.returncode
        if status is None or self.killed or (status == 0 and self.may_finish):
            return
        raise ProgramDied(
            f"{self.name} {_how_it_ended(status)}; the end of {self.log}:\n{self._end_of_log()}"
        )

    def kill(self) -> None:
        """SIGKILL, on purpose: its end is no failure."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def dismiss(self) -> None:
        """SIGTERM to one that is not needed after all, however far it has started: its end is no failure."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def line_after(self, prefix: str) -> str | None:
        """What follows `prefix` on the first line of its log that begins with it."""
        for line in self._lines():
            if line.startswith(prefix):
                return line.removeprefix(prefix).strip()
        return None

    def _lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _end_of_log(self) -> str:
        return "\n".join(f"    {line}" for line in self._lines()[-_NUM_LOG_LINES:]) or "    (empty)"


class Programs:
    """Use as an async context manager: what still runs at its end is stopped."""

    def __init__(
        self, logs: Path, *, command: Sequence[str] = (sys.executable, "-m", "penstock.cli")
    ) -> None:
        self._logs = logs
        self._command = command
        self._programs: list[Program] = []

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(
        self, name: str, arguments: Sequence[str], *, may_finish: bool = False, is_client: bool = False
    ) -> Program:
        """Starts the command with these arguments, away from the terminal's Ctrl-C: we pass that on."""
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *arguments,
                env=parent.marked({**os.environ, **_ENVIRONMENT}),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        program = Program(name=name, log=log, process=process, may_finish=may_finish, is_client=is_client)
        self._programs.append(program)
        return program

    async def run(self, name: str, arguments: Sequence[str], *, timeout_seconds: float) -> None:
        """Starts a program and waits for its end. Raises ProgramDied."""
        program = await self.start(name, arguments, may_finish=True, is_client=True)
        await self.finished(program, timeout_seconds=timeout_seconds)

    async def ready(self, program: Program, prefix: str, *, timeout_seconds: float) -> str:
        """Waits for a line of output that begins with `prefix`; returns the rest of it. Raises ProgramDied."""
        deadline = time.monotonic() + timeout_seconds
        while (found := program.line_after(prefix)) is None:
            self.check()
            if time.monotonic() > deadline:
                raise ProgramDied(
                    f"{program.name} did not print {prefix!r} within {timeout_seconds:.0f} s; see {program.log}"
                )
            await asyncio.sleep(_POLL_SECONDS)
        return found

    async def finished(self, program: Program, *, timeout_seconds: float) -> None:
        """Waits for a program's end, while it watches the others. Raises ProgramDied."""
        deadline = time.monotonic() + timeout_seconds
        while program.is_running:
            self.check()
            if time.monotonic() > deadline:
                raise ProgramDied(
                    f"{program.name} still runs after {timeout_seconds:.0f} s; see {program.log}"
                )
            await asyncio.sleep(_POLL_SECONDS)
        program.check()

    def check(self) -> None:
        """Raises ProgramDied for the first program that ended unasked."""
        for program in self._programs:
            program.check()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL after a grace: clients first, so that they leave in order. Takes less than 10 s."""
        running = [program for program in self._programs if program.is_running]
        await _stop_all([program for program in running if program.is_client], _CLIENT_GRACE_SECONDS)
        await _stop_all([program for program in running if not program.is_client], _SERVER_GRACE_SECONDS)


async def _stop_all(programs: Sequence[Program], grace_seconds: float) -> None:
    for program in programs:
        with contextlib.suppress(ProcessLookupError):
            program.process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(grace_seconds):
            for program in programs:
                await program.process.wait()
    except TimeoutError:
        slow = ", ".join(program.name for program in programs if program.is_running)
        _log.warning("killed, for they did not end within %.1f s: %s", grace_seconds, slow)
        for program in programs:
            program.kill()
        for program in programs:
            await program.process.wait()


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
