"""A file that does nothing but take room, for the day when there is none.

A ledger on a full disk can be read, but not be closed: SQLite cannot bring its log into the
database. The ballast is deleted before the ledger is closed, however the run ends, so that
there is room for that.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


class Ballast:
    """Held from `hold` to `release`; a killed process leaves it to the next one."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path = path
        self._num_bytes = num_bytes

    def hold(self) -> None:
        """Reserves the room. Without it, the run goes on and warns."""
        if not self._num_bytes:
            return
        try:
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._num_bytes)
        except OSError as error:
            _log.warning("%s: no room for a ballast of %d bytes: %s", self._path, self._num_bytes, error)
            self.release()

    def release(self) -> None:
        """Gives the room back. May be called twice."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s cannot be deleted: %s", self._path, error)
