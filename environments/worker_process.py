"""One worker process from the server's side: spawned, called, killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from environments import frames
from environments.base import Description, Form
from penstock.errors import ConfigError, EnvironmentFault, FaultKind, PenstockError, ProtocolError

_log = logging.getLogger(__name__)

OUTPUT_BYTES_A_MINUTE = 16 * 1024
_DEATH_SECONDS = 5.0


class WorkerTimeout(EnvironmentFault):
    """A call ran into its deadline; its worker was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """What one worker process may use."""

    memory_bytes: int = 4 * 1024**3
    """Private writable memory (RLIMIT_DATA)."""
    num_files: int = 256

    def to_json(self) -> dict[str, int]:
        return {"memory_bytes": self.memory_bytes, "num_files": self.num_files}


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSpec:
    """What a worker loads. Crosses to it as JSON."""

    target: str
    """MODULE:CLASS, or MODULE:FUNCTION that makes an environment."""
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    start_seconds: float = 120.0
    """How long a worker may take to import, construct and describe it."""


class Loaded(NamedTuple):
    """What a worker says of the environment that it has built."""

    description: Description
    form: Form


class _Streams(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    output: asyncio.StreamReader
    output_writer: asyncio.StreamWriter
    """Never written to; its end is ours to close."""


class Worker:
    """One worker process. Whoever borrowed it makes one call at a time."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], streams: _Streams) -> None:
        self.name = name
        self._process = process
        self._reader, self._writer, self._output, self._output_writer = streams
        self._usable = True
        self._died = asyncio.Event()
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    async def spawn(cls, name: str) -> Worker:
        channel, its_channel = socket.socketpair()
        output, its_output = socket.socketpair()
        with its_channel, its_output:
            # Not asyncio's: that forks in earnest, under gRPC's threads, where this only starts a program.
            process = subprocess.Popen(  # noqa: ASYNC220  returns at once
                [sys.executable, "-P", "-m", "environments.worker", str(its_channel.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=its_output.fileno(),
                stderr=its_output.fileno(),
                pass_fds=(its_channel.fileno(),),
                # Ctrl-C is for the server; and a kill takes the worker's own children along.
                start_new_session=True,
                # Equal tasks must give equal messages in every worker: sets of str iterate alike.
                env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )
        reader, writer = await asyncio.open_connection(sock=channel)
        return cls(name, process, _Streams(reader, writer, *await asyncio.open_connection(sock=output)))

    @property
    def usable(self) -> bool:
        return self._usable and not self._died.is_set()

    async def start(self, spec: EnvironmentSpec) -> Loaded:
        """Imports and constructs the environment. Raises ConfigError, EnvironmentFault."""
        request = {
            "target": spec.target,
            "options": dict(spec.options),
            "limits": spec.limits.to_json(),
            "folder": str(Path.cwd()),
        }
        loaded = await self._exchange("start", request, spec.start_seconds)
        if not isinstance(loaded, dict) or loaded.get("form") not in set(Form):
            raise EnvironmentFault(f"{self.name} described its environment as {loaded!r}; expected an object")
        return Loaded(frames.description_from_json(loaded.get("description")), Form(loaded["form"]))

    async def call(self, call: str, seconds: float, **arguments: object) -> object:
        """Raises WorkerTimeout, EnvironmentFault. A worker that does not answer well is killed."""
        return await self._exchange(call, {"call": call, "seconds": seconds, **arguments}, seconds)

    async def _exchange(self, call: str, request: Mapping[str, object], seconds: float) -> object:
        try:
            frame = frames.encode(request)
        except ValueError as error:
            # Control characters take six bytes each. The worker has not heard of it.
            raise EnvironmentFault(
                f"{call} cannot be handed to a worker: {error}", kind=FaultKind.DATA
            ) from None
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(frame)
                await self._writer.drain()
                reply = await frames.read_frame(self._reader)
            fault = frames.fault_of(reply)
        except TimeoutError:
            self.kill()
            raise WorkerTimeout(f"{call} took more than {seconds:.3g} s; its worker was killed") from None
        except (OSError, asyncio.IncompleteReadError):
            epitaph = await self._epitaph()
            self.kill()
            raise EnvironmentFault(f"the worker died in {call}: {epitaph}") from None
        except ProtocolError as error:
            self.kill()
            raise EnvironmentFault(f"the worker answered {call} with garbage: {error}") from error
        except BaseException:
            self.kill()
            raise
        if fault is None:
            return reply.get("ok")
        raise self._error(*fault)

    def _error(self, kind: str, message: str) -> PenstockError:
        if kind == "config":
            return ConfigError(message)
        return EnvironmentFault(
            message, kind=FaultKind.DATA if kind == FaultKind.DATA else FaultKind.INFRASTRUCTURE
        )

    async def _epitaph(self) -> str:
        await self.ended()
        code = self._process.returncode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """Ends the process and its children at once. May be called twice."""
        self._usable = False
        self._writer.close()
        if not self._died.is_set():
            self._kill_group()

    async def ended(self, seconds: float = _DEATH_SECONDS) -> None:
        """Returns when the process has died, or after `seconds`; woken by the kernel."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._died.wait()

    async def lives(self) -> None:
        """Returns when the process has died. It may live as long as the server."""
        await self._died.wait()

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.poll()
        self._died.set()
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def log_output(self) -> None:
        """Logs what the process prints, up to a limit a minute, and reads on in silence."""
        minute, budget = 0, 0
        try:
            while chunk := await self._output.read(4096):
                if int(time.monotonic() / 60) != minute:
                    minute, budget = int(time.monotonic() / 60), OUTPUT_BYTES_A_MINUTE
                if budget > 0:
                    _log.info("%s printed: %s", self.name, chunk[:budget].decode(errors="replace").rstrip())
                    if len(chunk) >= budget:
                        _log.warning("%s printed too much; the rest of this minute is dropped", self.name)
                budget -= len(chunk)
        finally:
            self._output_writer.close()
