"""A member of a group, for as long as the group lives: `python -m penstock.broadcast`.

Started by the coordinator (it sends, from the trainer's segment) or by an actor (it receives, into
a segment of its own, whatever the actor does meanwhile). words.py has what is said.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch._C._distributed_c10d import Store

from penstock import log, parent
from penstock.broadcast import meeting
from penstock.broadcast.pieces import Overdue, Pieces, Place, join
from penstock.broadcast.words import Backend, Event, EventKind, Formation, Reason, Sending, Settings
from penstock.errors import WeightTransferError
from penstock.watchdog import Watchdog
from penstock.weights.manifest import SharedMemoryMedium
from penstock.weights.segment import NONCE_BYTES, OwnedSegment, create_segment, open_segment, remove_stale

_log = logging.getLogger(__name__)

_TELL_SECONDS = 0.2
"""Between two reports of what has moved."""
_LINGER_SECONDS = 2 * meeting.SILENT_SECONDS
"""A receiver whose group failed is heard for so much longer: the fault is another's."""
_IDLE_SECONDS = 0.1
_UNTIL_KILLED = 3.0
"""A wait that does not end by itself gets so many times its length."""


class GroupFailed(Exception):
    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def main() -> NoReturn:
    # Its starter gone, nobody wants what arrives here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent.follow(signal.SIGKILL)
    log.configure()
    settings = Settings.from_line(sys.stdin.readline())
    torch.set_num_threads(1)
    with Watchdog() as watchdog:
        if settings.rank == 0:
            _send(settings, watchdog)
        else:
            _receive(settings, watchdog)
    sys.stdout.flush()
    # Without destructors: that of a communicator that failed may not return.
    os._exit(0)


def tell(kind: EventKind, **fields: object) -> None:
    sys.stdout.write(Event(kind=kind, **fields).to_line() + "\n")  # type: ignore[arg-type]
    sys.stdout.flush()


# -- the sender -----------------------------------------------------------------------------


def _send(settings: Settings, watchdog: Watchdog) -> None:
    store, port = meeting.open_store(settings.host, settings.forming_seconds)
    commands: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_commands, args=(commands,), name="commands", daemon=True).start()
    device = _device(settings.device)
    tell(EventKind.LISTENING, port=port, device=device.type)
    line = commands.get(timeout=settings.forming_seconds)
    if line is None:
        return
    formation = Formation.from_line(line)
    own = meeting.connect(settings.host, port, settings.forming_seconds)
    attendance = meeting.Attendance(meeting.of_group(own, formation.group), formation.size)
    sender = Sender(settings, formation, meeting.of_group(store, formation.group), attendance, watchdog)
    try:
        sender.form(device)
        sender.serve(commands)
    except GroupFailed as failure:
        tell(EventKind.FAILED, reason=failure.reason, message=str(failure))
        time.sleep(meeting.SILENT_SECONDS + 2 * meeting.BEAT_SECONDS)
        tell(EventKind.SILENT, ranks=attendance.silent())


def _read_commands(commands: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        commands.put(line)
    commands.put(None)


class Sender:
    """Rank 0."""

    def __init__(
        self,
        settings: Settings,
        formation: Formation,
        store: Store,
        attendance: meeting.Attendance,
        watchdog: Watchdog,
    ) -> None:
        self._settings = settings
        self._formation = formation
        self._store = store
        self._attendance = attendance
        self._watchdog = watchdog
        self._agenda = meeting.Agenda(store)
        self._pieces: Pieces | None = None

    def form(self, device: torch.device) -> None:
        """Waits for every member. Raises GroupFailed."""
        settings = self._settings
        until = time.monotonic() + settings.forming_seconds
        while absent := self._attendance.absent():
            if time.monotonic() > until:
                raise GroupFailed(
                    Reason.FORMING,
                    f"{len(absent)} of {self._formation.size - 1} members did not come within "
                    f"{settings.forming_seconds:.0f} s",
                )
            time.sleep(_IDLE_SECONDS)
        place = _place(settings, self._store, 0, self._formation.size, device, self._check)
        self._pieces = _joined(self._formation.backend, place, self._watchdog)
        tell(EventKind.FORMED)

    def serve(self, commands: queue.Queue[str | None]) -> None:
        """Broadcasts what it is told to, until it is told no more. Raises GroupFailed."""
        while True:
            try:
                line = commands.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                self._check()
                continue
            if line is None:
                return
            self._broadcast(Sending.from_line(line))

    def _broadcast(self, sending: Sending) -> None:
        assert self._pieces is not None
        medium = SharedMemoryMedium(name=sending.segment, nonce=sending.nonce)
        try:
            segment = open_segment(medium, sending.num_bytes)
        except WeightTransferError as error:
            _log.warning("version %s is not broadcast: %s", sending.version, error)
            self._sent(sending, 0.0, is_whole=False)
            return
        started = time.monotonic()
        self._agenda.announce(sending)
        moved = _Moved(self._watchdog, self._settings.timeout_seconds, tell_all=True)
        _move(self._pieces, segment.payload[: sending.num_bytes], moved, self._watchdog)
        self._sent(sending, time.monotonic() - started, is_whole=segment.nonce == sending.nonce)

    def _sent(self, sending: Sending, seconds: float, *, is_whole: bool) -> None:
        tell(
            EventKind.SENT,
            epoch=sending.epoch,
            step=sending.step,
            digest=sending.digest,
            num_bytes=sending.num_bytes,
            seconds=seconds,
            is_whole=is_whole,
        )

    def _check(self) -> None:
        silent = self._attendance.silent()
        if silent:
            raise GroupFailed(Reason.LOST, f"{len(silent)} members fell silent")


# -- a receiver -----------------------------------------------------------------------------


def _receive(settings: Settings, watchdog: Watchdog) -> None:
    heartbeat: meeting.Heartbeat | None = None
    try:
        try:
            store = meeting.connect(settings.host, settings.port, settings.forming_seconds)
            own = meeting.connect(settings.host, settings.port, settings.forming_seconds)
        except RuntimeError as error:
            raise GroupFailed(Reason.FORMING, f"the sender's store does not answer: {error}") from error
        heartbeat = meeting.Heartbeat(meeting.of_group(own, settings.group), settings.rank)
        receiver = Receiver(settings, meeting.of_group(store, settings.group), heartbeat, watchdog)
        receiver.run()
    except GroupFailed as failure:
        tell(EventKind.FAILED, reason=failure.reason, message=str(failure))
        if heartbeat is not None:
            heartbeat.lost.wait(_LINGER_SECONDS)


class Receiver:
    """Has versions arrive in a segment, one over the other."""

    def __init__(
        self, settings: Settings, store: Store, heartbeat: meeting.Heartbeat, watchdog: Watchdog
    ) -> None:
        self._settings = settings
        self._store = store
        self._heartbeat = heartbeat
        self._watchdog = watchdog
        self._agenda = meeting.Agenda(store)
        self._owned: OwnedSegment | None = None
        remove_stale(settings.segment_prefix)

    def run(self) -> None:
        """Until the sender is gone. Raises GroupFailed, WeightTransferError."""
        settings = self._settings
        device = _device(settings.device)
        place = _place(settings, self._store, settings.rank, settings.size, device, self._check)
        pieces = _joined(settings.backend, place, self._watchdog)
        tell(EventKind.FORMED)
        try:
            while True:
                self._check()
                try:
                    sending = self._agenda.look()
                except meeting.StoreLost as error:
                    raise GroupFailed(Reason.LOST, f"the sender ended the group: {error}") from error
                if sending is not None:
                    self._take(pieces, sending)
        finally:
            if self._owned is not None:
                self._owned.remove()

    def _take(self, pieces: Pieces, sending: Sending) -> None:
        segment = self._make_room(sending.num_bytes).segment
        segment.set_nonce(bytes(NONCE_BYTES))
        segment.set_num_arrived(0)
        nonce = secrets.token_bytes(NONCE_BYTES)
        segment.set_nonce(nonce)
        tell(
            EventKind.BEGAN,
            epoch=sending.epoch,
            step=sending.step,
            digest=sending.digest,
            segment=segment.name,
            nonce=nonce.hex(),
        )
        moved = _Moved(self._watchdog, self._settings.timeout_seconds, also=segment.set_num_arrived)
        _move(pieces, segment.payload[: sending.num_bytes], moved, self._watchdog)

    def _make_room(self, num_bytes: int) -> OwnedSegment:
        """Raises WeightTransferError: then this member is at fault, and ends without a word to the others."""
        if self._owned is None or self._owned.segment.capacity < num_bytes:
            if self._owned is not None:
                self._owned.remove()
            self._owned = create_segment(self._settings.segment_prefix, num_bytes)
        return self._owned

    def _check(self) -> None:
        if self._heartbeat.lost.is_set():
            raise GroupFailed(Reason.LOST, "the sender ended the group")


# -- both -----------------------------------------------------------------------------------


class _Moved:
    """Notes progress: for whoever started this process, and for the watchdog."""

    def __init__(
        self,
        watchdog: Watchdog,
        timeout_seconds: float,
        *,
        tell_all: bool = False,
        also: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._watchdog = watchdog
        self._seconds = _UNTIL_KILLED * timeout_seconds
        self._tell_all = tell_all
        self._also = also
        self._told_at = time.monotonic()
        self.arm()

    def arm(self) -> None:
        self._watchdog.arm("a piece of a broadcast", self._seconds)

    def __call__(self, num_bytes: int) -> None:
        self._also(num_bytes)
        now = time.monotonic()
        if now - self._told_at > _TELL_SECONDS:
            self.arm()
            self._told_at = now
            if self._tell_all:
                tell(EventKind.MOVED, num_bytes=num_bytes)


def _move(pieces: Pieces, payload: NDArray[np.uint8], moved: _Moved, watchdog: Watchdog) -> None:
    try:
        pieces.broadcast(payload, moved)
    except Overdue as error:
        raise GroupFailed(Reason.TIMEOUT, str(error)) from error
    except RuntimeError as error:
        raise GroupFailed(Reason.LOST, str(error)) from error
    finally:
        watchdog.disarm()


def _joined(backend: str, place: Place, watchdog: Watchdog) -> Pieces:
    watchdog.arm("the group's members", _UNTIL_KILLED * place.forming_seconds)
    try:
        return join(Backend(backend), place)
    except (Overdue, RuntimeError) as error:
        raise GroupFailed(Reason.FORMING, str(error)) from error
    finally:
        watchdog.disarm()


def _place(
    settings: Settings, store: Store, rank: int, size: int, device: torch.device, check: Callable[[], None]
) -> Place:
    host = settings.host
    return Place(
        store=store,
        rank=rank,
        size=size,
        device=device,
        address=meeting.own_address(host, settings.port) if rank else meeting.sender_address(host),
        piece_bytes=settings.piece_bytes,
        timeout_seconds=settings.timeout_seconds,
        forming_seconds=settings.forming_seconds,
        check=check,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
