"""A program that another program started ends with it, however that one ended.

The starter names itself in the environment (`marked`); the program calls `follow`. Linux
then sends it a signal when its parent dies, SIGKILL included. Elsewhere a thread looks
once a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

_VARIABLE = "PENSTOCK_STARTED_BY"
_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 1.0


def marked(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a program that is to `follow` this process."""
    return {**environment, _VARIABLE: str(os.getpid())}


def follow(number: signal.Signals) -> None:
    """Has this process sent `number` when its parent dies. Does nothing if no `marked` program started it."""
    starter = os.environ.get(_VARIABLE)
    if starter is None:
        return
    send_at_parents_death(number)
    if not _is_alive(int(starter)):
        # It died before we could ask for the signal.
        os.kill(os.getpid(), number)


def send_at_parents_death(number: signal.Signals) -> None:
    """Call it in the process's main thread, whoever started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    else:
        watch = threading.Thread(target=_watch, args=(os.getppid(), number), name="watch-parent", daemon=True)
        watch.start()


def _watch(parent: int, number: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), number)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
