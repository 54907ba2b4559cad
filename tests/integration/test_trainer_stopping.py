"""What a signal does to a rank, with the loop replaced by a nap."""

import subprocess
import sys
import time

import psutil

PROGRAM = """
import sys, time
from learner.training.stopping import StopOnSignal
stop = StopOnSignal(grace_seconds={grace})
stop.listen()
print("listening", flush=True)
while not ({heeds} and stop.is_set()):
    time.sleep(0.01)
stop.finished()
sys.exit(3)
"""


def start(*, grace: float, heeds: bool) -> subprocess.Popen[str]:
    program = PROGRAM.format(grace=grace, heeds=heeds)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


def test_a_loop_that_heeds_the_flag_leaves_by_itself() -> None:
    process = start(grace=60, heeds=True)
    process.terminate()
    assert process.wait(30) == 3


def test_a_loop_that_does_not_is_abandoned_after_the_grace_period() -> None:
    process = start(grace=0.1, heeds=False)
    process.terminate()
    assert process.wait(30) == 0


def test_a_rank_whose_parent_is_killed_stops() -> None:
    program = PROGRAM.format(grace=60, heeds=True)
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "listening\n"
    (rank,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait(10)
    give_up = time.monotonic() + 30
    while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < give_up
        time.sleep(0.05)
