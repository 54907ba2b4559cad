"""The ledger's file: opened so that a damaged one is refused, and no two learners share one.

Every page carries a checksum (SQLite's cksumvfs), which is verified whenever the page is
read; the frames of the write-ahead log have their own. At the start every page is read
once, and the log is copied into the file and synced: what a process that died of a
failed sync left in the page cache alone is then on disk, or the start fails.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import time
import uuid
from importlib import resources
from pathlib import Path
from typing import IO

import apsw
import apsw.sqlite_extra

from penstock.errors import ConfigError, LedgerError

_log = logging.getLogger(__name__)

FORMAT = "5"
# Rows hold payloads of several KiB: large pages commit 2.5 times as many a second.
_PAGE_BYTES = 65536
_CHECKSUM_BYTES = 8
_WRONG_CHECKSUM = apsw.SQLITE_IOERR_DATA
_DAMAGED = (
    "a page does not have its checksum: the file was damaged after it was written. Bring it back from "
    "a backup, or start a new run from the newest checkpoint"
)
_BUSY_MILLISECONDS = 5000
_LOCK_SECONDS = 3.0
"""A coordinator that was killed just now may take a moment to be gone."""
_LOCK_POLL_SECONDS = 0.05


def lock(path: Path) -> IO[str]:
    """Holds a lock on the run folder for as long as the file is open. Raises ConfigError, LedgerError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = (path.parent / "ledger.lock").open("a")
    except OSError as error:
        raise LedgerError(f"{path.parent} cannot be written: {error}") from error
    give_up = time.monotonic() + _LOCK_SECONDS
    while not _try_lock(handle):
        if time.monotonic() > give_up:
            handle.close()
            raise ConfigError(f"{path.parent}: another learner is running in this folder; stop it first")
        time.sleep(_LOCK_POLL_SECONDS)
    return handle


def _try_lock(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_writer(path: Path) -> apsw.Connection:
    """Opens the database, or makes it; every page is verified. Raises LedgerError, ConfigError."""
    try:
        db = apsw.Connection(str(path), vfs=_vfs())
        return _prepare(db, path)
    except apsw.Error as error:
        raise LedgerError(f"{path}: the ledger cannot be opened: {explain(error)}") from error


def open_reader(path: Path) -> apsw.Connection:
    """Raises apsw.Error."""
    reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY, vfs=_vfs())
    reader.set_busy_timeout(_BUSY_MILLISECONDS)
    return reader


def explain(error: BaseException) -> str:
    """What an error, mostly SQLite's, means for the ledger."""
    while isinstance(error.__context__, apsw.Error | OSError):
        # SQLite has rolled back by itself, and undoing it once more failed: the first error tells why.
        error = error.__context__
    if isinstance(error, OSError):
        return {errno.EIO: "disk I/O error", errno.ENOSPC: "the disk is full"}.get(
            error.errno or 0, str(error)
        )
    if not isinstance(error, apsw.Error):
        return repr(error)
    return _DAMAGED if getattr(error, "extendedresult", None) == _WRONG_CHECKSUM else str(error)


def check_format(db: apsw.Connection, path: Path) -> None:
    """Raises ConfigError."""
    found = db.execute("SELECT value FROM meta WHERE name = 'format'").fetchall()[0][0]
    if found != FORMAT:
        raise ConfigError(f"{path}: ledger format is {found}; this version of penstock reads {FORMAT}")


def _prepare(db: apsw.Connection, path: Path) -> apsw.Connection:
    if _vfs() is not None:
        db.reserve_bytes(None, _CHECKSUM_BYTES)
    db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    os.chmod(path, 0o600)  # noqa: PTH101
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchall():
        with db:
            db.execute(resources.files(__package__).joinpath("ledger.sql").read_text(encoding="utf-8"))
            db.execute(
                "INSERT INTO meta VALUES ('format', ?), ('run_id', ?)", (FORMAT, uuid.uuid4().hex[:12])
            )
    check_format(db, path)
    damage = str(db.execute("PRAGMA quick_check(1)").fetchall()[0][0])
    if damage != "ok":
        reason = _DAMAGED if f"code={_WRONG_CHECKSUM}" in damage else damage
        raise LedgerError(f"{path}: the ledger cannot be trusted: {reason}")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return db


@functools.cache
def _vfs() -> str | None:
    """The file system layer that verifies checksums; None where this build of apsw lacks it."""
    try:
        apsw.sqlite_extra.load(_registrar(), "cksumvfs")
    except apsw.sqlite_extra.NotAvailable:
        _log.warning("this build of apsw lacks cksumvfs: a damaged ledger may go unnoticed")
        return None
    return "cksmvfs"


@functools.cache
def _registrar() -> apsw.Connection:
    """The connection that an extension is loaded into. It stays open, as the extension does."""
    return apsw.Connection(":memory:")
