"""Room on the run folder's disk: leases stop while what is leased can still be written down.

Pure: readings are passed in. A ledger that cannot write must stop the run; so actors get
no new work before that, and what they still hold is received.
"""

from __future__ import annotations

from enum import StrEnum

_WARN = 2.0
_RESUME = 1.25
"""Times the minimum: leases are granted again above it, so that the edge is not crossed to and fro."""


class Room(StrEnum):
    ENOUGH = "enough"
    LOW = "low"
    """Leases are granted still; an event warns."""
    NONE = "none"
    """No leases."""


class DiskGuard:
    """Follows the free space of one disk."""

    def __init__(self, min_free_bytes: int) -> None:
        self._min_free_bytes = min_free_bytes
        self.room = Room.ENOUGH

    def note(self, free_bytes: int) -> str | None:
        """Takes a reading. Returns what an operator should read if the state changed."""
        before, self.room = self.room, self._next(free_bytes)
        if self.room is before:
            return None
        return (
            f"{self.describe(free_bytes)}: "
            + {
                Room.ENOUGH: "enough",
                Room.LOW: "soon too little" if before is Room.ENOUGH else "leases are granted again",
                Room.NONE: "leases stop until there is room",
            }[self.room]
        )

    def describe(self, free_bytes: int) -> str:
        return (
            f"the run folder's disk has {free_bytes / 2**20:.0f} MiB free; "
            f"ledger.min_free_bytes is {self._min_free_bytes / 2**20:.0f} MiB"
        )

    def _next(self, free_bytes: int) -> Room:
        edge = self._min_free_bytes * (_RESUME if self.room is Room.NONE else 1.0)
        if free_bytes < edge:
            return Room.NONE
        return Room.LOW if free_bytes < _WARN * self._min_free_bytes else Room.ENOUGH
