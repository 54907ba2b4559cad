"""What a signal does to a rank, with the loop replaced by a nap."""

import subprocess
import sys

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
