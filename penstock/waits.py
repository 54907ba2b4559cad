"""What a process waits for: each wait has a name, an owner who can end it, and a deadline.

    with waits.on("a step", owner="environment words at 127.0.0.1:7081", limit_seconds=60.0):
        await ...

The limit is told, not enforced: whoever waits has a deadline of its own, and this is its length.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitSummary:
    """Waits of one name for one owner."""

    what: str
    owner: str
    count: int
    longest_seconds: float
    limit_seconds: float


@dataclass(frozen=True, slots=True)
class _Wait:
    what: str
    owner: str
    since: float
    limit_seconds: float


class Waits:
    """The waits of one process, as they are."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._numbers = itertools.count()
        self._waits: dict[int, _Wait] = {}

    @contextlib.contextmanager
    def on(self, what: str, *, owner: str, limit_seconds: float) -> Iterator[None]:
        number = next(self._numbers)
        self._waits[number] = _Wait(what, owner, self._clock(), limit_seconds)
        try:
            yield
        finally:
            del self._waits[number]

    def summary(self) -> list[WaitSummary]:
        """By name and owner, the longest wait first."""
        now = self._clock()
        gathered: defaultdict[tuple[str, str], list[_Wait]] = defaultdict(list)
        for wait in self._waits.values():
            gathered[wait.what, wait.owner].append(wait)
        summaries = [
            WaitSummary(
                what=what,
                owner=owner,
                count=len(found),
                longest_seconds=now - min(wait.since for wait in found),
                limit_seconds=max(wait.limit_seconds for wait in found),
            )
            for (what, owner), found in gathered.items()
        ]
        return sorted(summaries, key=lambda summary: -summary.longest_seconds)
