"""Programs end with the one that started them, SIGKILL included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from .cluster import wait_until

FOLLOWER = """
import signal, sys, time
from penstock import parent
parent.follow(signal.SIGTERM)
print("following", flush=True)
time.sleep(600)
"""
STARTER = """
import subprocess, sys, time
from penstock import parent
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=parent.marked())
print(process.pid, flush=True)
time.sleep(600)
"""
BRIEF = """
import subprocess, sys
from penstock import parent
late = "import time; time.sleep(0.5)\\n" + sys.argv[1]
print(subprocess.Popen([sys.executable, "-c", late], env=parent.marked()).pid, flush=True)
"""


def start(program: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A program that starts a follower, and the follower."""
    starter = subprocess.Popen(
        [sys.executable, "-c", program, FOLLOWER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert starter.stdout is not None
    return starter, psutil.Process(int(starter.stdout.readline()))


def test_a_follower_ends_when_its_starter_is_killed() -> None:
    starter, follower = start(STARTER)
    assert starter.stdout is not None
    assert starter.stdout.readline() == "following\n"
    assert follower.is_running()
    starter.kill()
    starter.wait(30)
    wait_until(lambda: not is_alive(follower), "the follower to end")


def test_a_follower_whose_starter_is_gone_before_it_can_ask_ends_as_well() -> None:
    starter, follower = start(BRIEF)
    starter.wait(30)
    wait_until(lambda: not is_alive(follower), "the follower to end")


QUICKSTART = """
import asyncio, sys, time
from pathlib import Path
from penstock.quickstart.programs import Programs

async def start():
    programs = Programs(Path(sys.argv[1]))
    async with programs:
        arguments = ("env", "serve", "reasoning_gym:spell_backward", "--bind", "127.0.0.1:0", "--workers", "1")
        server = await programs.start("environment", arguments)
        await programs.ready(server, "serving", timeout_seconds=60)
        print(server.process.pid, flush=True)
        time.sleep(600)

asyncio.run(start())
"""


def test_programs_of_a_killed_quickstart_end_with_it(tmp_path: Path) -> None:
    quickstart = subprocess.Popen(
        [sys.executable, "-c", QUICKSTART, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert quickstart.stdout is not None
    server = psutil.Process(int(quickstart.stdout.readline()))
    programs = [server, *server.children(recursive=True)]
    assert len(programs) > 1
    quickstart.kill()
    quickstart.wait(30)
    wait_until(lambda: not any(map(is_alive, programs)), "the environment server and its worker to end")


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_program_that_a_person_started_follows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock import parent

    monkeypatch.delenv("PENSTOCK_STARTED_BY", raising=False)
    monkeypatch.setattr(parent, "send_at_parents_death", lambda number: pytest.fail("it asked for a signal"))
    parent.follow(parent.signal.SIGTERM)
