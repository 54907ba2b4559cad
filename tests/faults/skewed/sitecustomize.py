"""On PYTHONPATH, it gives a process another wall clock: off by the seconds in the file PENSTOCK_TEST_CLOCK.

The file is read at every look at the clock, so that the clock can jump while the process
runs. `time.monotonic` stays as it is, as it does when a real clock is set. So does what gRPC
sees: it compares Python's clock with one that it reads in C.
"""

import os
import sys
import time
from pathlib import Path

_true_time = time.time
_true_time_ns = time.time_ns


def _offset() -> float:
    if sys._getframe(2).f_globals.get("__name__", "").startswith("grpc"):
        return 0.0
    try:
        return float(Path(os.environ["PENSTOCK_TEST_CLOCK"]).read_text() or 0.0)
    except (OSError, KeyError):
        return 0.0


time.time = lambda: _true_time() + _offset()
time.time_ns = lambda: _true_time_ns() + round(_offset() * 1e9)
