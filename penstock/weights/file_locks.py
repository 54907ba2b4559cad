"""Locks on files, which end with their process, and files that vanish when nobody needs them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def open_lock(path: Path, operation: int) -> int:
    """Opens and locks a file, which others may remove in between. Blocks."""
    while True:
        file = os.open(path, _FLAGS, 0o600)
        fcntl.flock(file, operation)
        if os.fstat(file).st_nlink:
            return file
        os.close(file)


def try_open_lock(path: Path) -> int | None:
    """Opens a file and locks it for this process alone; None if another one has it, or has just removed it."""
    file = os.open(path, _FLAGS, 0o600)
    if try_lock(file, fcntl.LOCK_EX) and os.fstat(file).st_nlink:
        return file
    os.close(file)
    return None


def try_lock(file: int, operation: int) -> bool:
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
