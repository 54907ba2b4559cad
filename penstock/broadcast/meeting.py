"""Where a group's members meet, and who of them is alive.

The sender has a TCPStore, bound to its own address alone. Through it the members find each other,
receivers learn that a broadcast begins, without an operation on a device that would wait for it,
and each receiver's process says twice a second that it lives. So the sender knows at whose fault
a broadcast failed: a member that is stopped or gone falls silent, the others do not.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from penstock.broadcast.words import Sending

_log = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
SILENT_SECONDS = 3.0
"""A member that says nothing for this long is lost."""
_LOOK_SECONDS = 5.0


class StoreLost(Exception):
    """The sender's store does not answer: the sender is gone, or ended the group."""


def open_store(host: str, seconds: float) -> tuple[TCPStore, int]:
    """Listens on a free port of `host`, and on no other address. seconds: as for `connect`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    port = int(listener.getsockname()[1])
    store = TCPStore(
        _reachable(host),
        port,
        is_master=True,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def connect(host: str, port: int, seconds: float) -> TCPStore:
    """A client of its own: one that waits keeps all who share it waiting.

    seconds: that it waits at most for what others are to write; process groups wait so for each other.
    """
    timeout = timedelta(seconds=seconds)
    return TCPStore(_reachable(host), port, is_master=False, timeout=timeout, wait_for_workers=False)


def own_address(host: str, port: int) -> str:
    """The address of this host that `host` is reached from. Sends nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((_reachable(host), port))
        return str(probe.getsockname()[0])


def sender_address(host: str) -> str:
    """What the sender's own connections are bound to, by the address that its store listens on."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostbyname(socket.gethostname())
    return _reachable(host)


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(host, host)


def of_group(store: Store, group: str) -> Store:
    """The group's part of a store. The name holds a secret of the coordinator's."""
    return PrefixStore(f"penstock/{group}", store)


class Agenda:
    """Which version is broadcast next. The sender writes it, the receivers wait for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._number = 0

    def announce(self, sending: Sending) -> None:
        self._store.set(f"sending/{self._number}", sending.to_line())
        self._number += 1

    def look(self) -> Sending | None:
        """The next version, if its broadcast begins within a moment. Raises StoreLost."""
        key = f"sending/{self._number}"
        started = time.monotonic()
        try:
            self._store.wait([key], timedelta(seconds=_LOOK_SECONDS))
            line = self._store.get(key).decode()
        except RuntimeError as error:
            if time.monotonic() - started >= 0.9 * _LOOK_SECONDS:
                return None
            raise StoreLost(str(error)) from error
        self._number += 1
        return Sending.from_line(line)


class Heartbeat:
    """A receiver's: says that its process runs, in a thread of its own."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._key = f"beat/{rank}"
        self.lost = threading.Event()
        """Set once the store does not answer any more."""
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        number = 0
        try:
            while True:
                number += 1
                self._store.set(self._key, str(number))
                time.sleep(BEAT_SECONDS)
        except RuntimeError as error:
            _log.debug("the group's store is gone: %s", error)
            self.lost.set()


class Attendance:
    """The sender's: which members' heartbeats it hears, in a thread of its own."""

    def __init__(self, store: Store, size: int) -> None:
        self._store = store
        now = time.monotonic()
        self._beats = dict.fromkeys(range(1, size), b"")
        self._heard_at = dict.fromkeys(range(1, size), now)
        self._thread = threading.Thread(target=self._listen, name="listen", daemon=True)
        self._thread.start()

    def absent(self) -> tuple[int, ...]:
        """Members that were never heard."""
        return tuple(rank for rank, beat in self._beats.items() if not beat)

    def silent(self) -> tuple[int, ...]:
        """Members that are not heard any more, or never were."""
        now = time.monotonic()
        return tuple(rank for rank, at in self._heard_at.items() if now - at > SILENT_SECONDS)

    def _listen(self) -> None:
        looked_at = time.monotonic()
        while True:
            now = time.monotonic()
            # A pause of this process is nobody's silence.
            gap, looked_at = max(now - looked_at - 2 * BEAT_SECONDS, 0.0), now
            for rank, beat in self._beats.items():
                self._heard_at[rank] += gap
                key = f"beat/{rank}"
                new = self._store.get(key) if self._store.check([key]) else b""
                if new != beat:
                    self._beats[rank], self._heard_at[rank] = new, now
            time.sleep(BEAT_SECONDS / 2)
