"""Starts servers for tests: in this process, or as the command does."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from environments.server import ServerConfig, serve, spec_of
from penstock.signals import Stop

CHECKOUT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def serving(
    target: str, options: Mapping[str, object] | None = None, **config: Any
) -> AsyncIterator[str]:
    """Yields the address."""
    settings = ServerConfig(bind="127.0.0.1:0", **config)
    stop = Stop()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(
            serve(
                spec_of(target, options or {}, settings),
                settings,
                stop,
                lambda _, bound: port.set_result(bound),
            )
        )
        try:
            async with asyncio.timeout(60):
                bound = await port
            yield f"127.0.0.1:{bound}"
        finally:
            stop.set("the test is over")


@contextlib.contextmanager
def command(*arguments: str, folder: Path = CHECKOUT) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs `penstock env serve ...` until it listens. Yields the process and the address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock.cli", "env", "serve", *arguments, "--bind", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), line + (process.stderr.read() if process.stderr else "")
        yield process, line.split()[-1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def run(*arguments: str, folder: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    """Runs `penstock env ...` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "penstock.cli", "env", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
    )
