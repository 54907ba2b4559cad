"""What makes no progress is ended, with its stacks and a reason; what was itself stopped is forgiven."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from penstock.watchdog import Watchdog

HANGS = """
import asyncio, time, logging
from penstock.signals import Stop
from penstock.watchdog import Watchdog, watch_loop
logging.basicConfig()

async def main():
    with Watchdog(look_seconds=0.05) as watchdog:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch_loop(watchdog, Stop(), seconds=1.5))
            await asyncio.sleep(0)
            forget_to_return()

def forget_to_return():
    while True:
        time.sleep(0.01)

asyncio.run(main())
"""

HOLDS_THE_INTERPRETER = """
import time
from penstock.watchdog import Watchdog

loop, ledger = Watchdog(), Watchdog(guards_interpreter=False)
loop.arm("the event loop", 0.1)
ledger.arm("a commit", 100.0)
ledger.disarm()
time.sleep(30)  # no watchdog's thread runs
"""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def statuses() -> list[int]:
    return []


@pytest.fixture
def watchdog(clock: Clock, statuses: list[int]) -> Iterator[Watchdog]:
    made = Watchdog(end=statuses.append, clock=clock)
    yield made
    made.disarm()


def look_at(watchdog: Watchdog, clock: Clock, *times: float) -> None:
    for now in times:
        clock.now = now
        watchdog.look()


def test_it_ends_what_is_overdue(watchdog: Watchdog, clock: Clock, statuses: list[int]):
    watchdog.arm("a step", 3.0)
    look_at(watchdog, clock, 101.0, 102.0)
    assert not statuses
    look_at(watchdog, clock, 103.0)
    assert statuses == [70]


def test_what_happens_in_time_is_left_alone(watchdog: Watchdog, clock: Clock, statuses: list[int]):
    for now in range(101, 120):
        watchdog.arm("a beat", 3.0)
        look_at(watchdog, clock, float(now))
    watchdog.disarm()
    look_at(watchdog, clock, 120.0, 121.0, 150.0)
    assert not statuses


def test_a_process_that_was_stopped_is_forgiven_the_time(
    watchdog: Watchdog, clock: Clock, statuses: list[int]
):
    watchdog.arm("a step", 3.0)
    look_at(watchdog, clock, 101.0, 900.0)
    assert not statuses
    look_at(watchdog, clock, 901.0)
    assert statuses == [70]


def test_an_event_loop_that_hangs_ends_its_process_with_the_reason_and_the_stacks():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 70
    assert "the event loop: nothing for 2 s" in done.stderr
    assert "forget_to_return" in done.stderr


def test_a_second_watchdog_leaves_the_firsts_timer_alone():
    code = [sys.executable, "-c", HOLDS_THE_INTERPRETER]
    done = subprocess.run(code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Timeout (" in done.stderr
