"""What was decided and is not on disk yet."""

from __future__ import annotations

import time
from collections.abc import Callable

from learner.coordinator.records import EventLogged, Record


class Journal:
    """Records in the order of the decisions, until the service writes them to the ledger."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._records: list[Record] = []

    def record(self, record: Record) -> None:
        self._records.append(record)

    def event(self, kind: str, message: str) -> None:
        """Something that an operator may want to read."""
        self.record(EventLogged(kind=kind, message=message, time=self._wall_clock()))

    def take(self) -> list[Record]:
        records, self._records = self._records, []
        return records
