"""Room on the run folder's disk: leases stop, and then the run, while what there is can still be written down.

Pure: readings are passed in. A ledger that cannot write must end the run at once; so before
that actors get no new work and what they hold is received, and after that the run ends in
order, with the ballast's room for its last commits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from learner.config import DiskConfig

_RESUME = 1.25
"""Times the room below which leases stop: above it they are granted again, so that nobody goes to and fro."""


class Room(StrEnum):
    ENOUGH = "enough"
    LOW = "low"
    """Leases are granted still; an event warns."""
    NO_LEASES = "no leases"
    NONE = "none"
    """The run ends. There is no way back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the file system says."""

    total_bytes: int
    free_bytes: int
    """For this user."""


class DiskGuard:
    """Follows the free space of one disk."""

    def __init__(self, config: DiskConfig) -> None:
        self._config = config
        self.room = Room.ENOUGH

    def note(self, reading: Reading) -> str | None:
        """Takes a reading. Returns what an operator should read if the state changed."""
        before, self.room = self.room, self._next(reading)
        if self.room is before:
            return None
        return f"{self.describe(reading)}: {_change(before, self.room)}"

    def describe(self, reading: Reading) -> str:
        return (
            f"the run folder's disk has {reading.free_bytes / 2**20:.1f} MiB free; leases stop below "
            f"{self._needed(reading, self._config.stop_leases_at) / 2**20:.1f} MiB and the run ends below "
            f"{self._needed(reading, self._config.end_run_at) / 2**20:.1f} MiB (ledger.disk)"
        )

    def _next(self, reading: Reading) -> Room:
        config, free = self._config, reading.free_bytes
        stopped = self.room is Room.NO_LEASES
        if self.room is Room.NONE or free < self._needed(reading, config.end_run_at):
            return Room.NONE
        if free < self._needed(reading, config.stop_leases_at) * (_RESUME if stopped else 1.0):
            return Room.NO_LEASES
        return Room.LOW if free < self._needed(reading, config.warn_at) else Room.ENOUGH

    def _needed(self, reading: Reading, used_share: float) -> float:
        """Bytes that are free when so much of the disk, or of what counts of a large one, is used."""
        return (1.0 - used_share) * min(reading.total_bytes, self._config.of_at_most_bytes)


def _change(before: Room, now: Room) -> str:
    match now:
        case Room.NONE:
            return "the run ends while its ledger can still be closed; make room, and start it again"
        case Room.NO_LEASES:
            return "leases stop until there is room"
        case Room.LOW | Room.ENOUGH if before is Room.NO_LEASES:
            return "leases are granted again"
        case Room.LOW:
            return "soon too little"
        case Room.ENOUGH:
            return "enough again"
