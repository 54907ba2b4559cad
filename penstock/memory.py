"""How a service's process handles its memory: it rarely looks for garbage, and may keep what it will need again."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_YOUNG, _MIDDLE, _OLD = 10_000, 20, 50
"""New values until the young are looked through, and how often that is until older ones are too."""


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While modules are imported, nobody looks for garbage; and they are never looked through again.

    Of the eight seconds that an actor takes to import torch and transformers, one was that.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def collect_rarely() -> None:
    """Call once the process is set up: what exists by now is not looked through again.

    Python looks for cycles among all values again and again, half a million of them where
    torch and transformers are imported, while what a message or a rollout leaves goes by its
    counts alone. A fifth of the samples that a profiler took of an actor's rollouts were that,
    and 6 % of a coordinator's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)


def keep_arrays() -> None:
    """For a process that reads the arrays of many messages: a coordinator.

    By default glibc takes each of them from the kernel and gives it back at once, which
    zeroes its pages anew for the next message: of 30 us that it takes to read a trajectory of
    1,024 tokens, 15. Arrays of 32 trajectories are smaller than the limit, a message is not.
    """
    _keep(own_mapping_bytes=256 * 1024, free_bytes=4 * 1024 * 1024)


def keep_chunks() -> None:
    """For a process that receives weights: an actor.

    Without it, of 76 ms of processor time in which ZeroMQ's medium receives 128 MiB, 32 go into
    finding and zeroing the pages of one chunk after the other.
    """
    _keep(own_mapping_bytes=32 * 1024 * 1024, free_bytes=64 * 1024 * 1024)


def keep_activations() -> None:
    """For a process that trains on a CPU.

    Every step makes the same tensors anew, of which those beyond 128 KiB were new pages each time:
    of a policy of 0.8M parameters it trains a tenth faster with those of the step before.
    """
    _keep(own_mapping_bytes=32 * 1024 * 1024, free_bytes=1024 * 1024 * 1024)


def _keep(*, own_mapping_bytes: int, free_bytes: int) -> None:
    """
    own_mapping_bytes: what is larger is still mapped by itself and given back.
    free_bytes: that a heap may end with; each of a process's busy threads has one.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library has no such setting
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, free_bytes)
        mallopt(_M_MMAP_THRESHOLD, own_mapping_bytes)
