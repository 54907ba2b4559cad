"""How the coordinator's process handles its memory: it keeps what it will need again, and rarely looks for garbage.

By default glibc takes each array of a message from the kernel and gives it back at once, which
zeroes its pages anew for the next message: of 30 us that it takes to read a trajectory of 1,024
tokens, 15. And Python looks through the run's millions of small values for cycles again and
again, while what a message leaves goes by its counts alone: 6 % of the time of taking
trajectories in.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 4 * 1024 * 1024
"""Of free memory that a heap may end with; each of gRPC's threads has one."""
_OWN_MAPPING_BYTES = 256 * 1024
"""What is larger is still mapped by itself and given back: arrays of 32 trajectories are smaller, a message is not."""
_YOUNG, _MIDDLE, _OLD = 10_000, 20, 50
"""New values until the young are looked through, and how often that is until older ones are too."""


def keep_memory() -> None:
    """For the whole process. Call once it is set up: what exists by now is not looked through again."""
    with contextlib.suppress(AttributeError, OSError):  # another C library has no such setting
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
