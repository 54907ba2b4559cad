"""Chunks of a broadcast, for a member of its group.

A process of its own receives every version of the group into a segment (penstock/broadcast), whether
the actor has time for it or not, so that no actor keeps the group waiting. Here the chunks are taken
from there as they arrive. What does not arrive is the next medium's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from penstock.broadcast.process import Member, MemberProcess, StartMember
from penstock.broadcast.words import Event, EventKind, Settings
from penstock.errors import WeightTransferError
from penstock.weights.manifest import Blob, CollectiveMedium, Medium, SharedMemoryMedium
from penstock.weights.media.base import Chunk, Patience
from penstock.weights.segment import Segment, open_segment

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.002
_MOST_GROUPS = 3
"""The one that versions come from, one that takes its place, and one whose end is not yet known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What the learner tells a member of its group."""

    group: str
    port: int
    """Of the sender's store, on the learner's host."""
    rank: int
    size: int
    backend: str
    piece_bytes: int
    timeout_seconds: float
    forming_seconds: float


class CollectiveReceiver:
    """The groups that this actor is a member of. `invite` may be called while another thread fetches."""

    def __init__(self, *, host: str, device: str, start: StartMember = MemberProcess) -> None:
        """
        host: that the learner is reached by.
        device: of the engine; where NCCL receives.
        """
        self._host = host
        self._device = device
        self._start = start
        self._lock = threading.Lock()
        self._groups: dict[str, _Membership] = {}

    @property
    def medium(self) -> type[Medium]:
        return CollectiveMedium

    def invite(self, invitation: Invitation) -> None:
        """Joins a group, in a process of its own. Call it in a thread that lives as long as the program."""
        with self._lock:
            if invitation.group in self._groups:
                return
            for group in [name for name, each in self._groups.items() if each.failure]:
                self._groups.pop(group).leave()
            while len(self._groups) >= _MOST_GROUPS:
                self._groups.pop(next(iter(self._groups))).leave()
            _log.info("joining %s as member %d of %d", invitation.group, invitation.rank, invitation.size - 1)
            self._groups[invitation.group] = _Membership(self._settings(invitation), self._start)

    def has(self, medium: CollectiveMedium) -> bool:
        """Whether versions of that group arrive here."""
        membership = self._groups.get(medium.group)
        return membership is not None and not membership.failure

    def chunks(
        self, blob: Blob, medium: Medium, indices: Sequence[int], patience: Patience
    ) -> Generator[Chunk, None, None]:
        assert isinstance(medium, CollectiveMedium)
        membership = self._current(medium.group)
        if membership is None:
            raise WeightTransferError(f"this actor is no member of {medium.group}")
        segment, nonce = membership.arrival(blob, patience)
        for index in indices:
            where = blob.chunk(index)
            membership.await_bytes(segment, nonce, where.stop, blob, patience)
            yield index, segment.payload[where]

    def close(self) -> None:
        with self._lock:
            while self._groups:
                self._groups.popitem()[1].leave()

    def _current(self, group: str) -> _Membership | None:
        """Leaves the groups before the one that a version comes from."""
        with self._lock:
            if group in self._groups:
                while (older := next(iter(self._groups))) != group:
                    self._groups.pop(older).leave()
            return self._groups.get(group)

    def _settings(self, invitation: Invitation) -> Settings:
        return Settings(
            host=self._host,
            device=self._device if invitation.backend == "nccl" else "cpu",
            timeout_seconds=invitation.timeout_seconds,
            forming_seconds=invitation.forming_seconds,
            piece_bytes=invitation.piece_bytes,
            port=invitation.port,
            group=invitation.group,
            rank=invitation.rank,
            size=invitation.size,
            backend=invitation.backend,
            segment_prefix=f"penstock-broadcast-{os.geteuid()}",
        )


class _Membership:
    """One group's process, and the version that it has or receives."""

    def __init__(self, settings: Settings, start: StartMember) -> None:
        self._group = settings.group
        self._timeout_seconds = settings.timeout_seconds
        self._changed = threading.Condition()
        self._began: Event | None = None
        self._segment: Segment | None = None
        self.failure = ""
        self._member: Member = start(settings, self._on_event)

    def leave(self) -> None:
        self._member.kill()

    def arrival(self, blob: Blob, patience: Patience) -> tuple[Segment, str]:
        """The segment that a version arrives in, or has arrived in, and its nonce. Raises WeightTransferError."""
        moved_at, moved = time.monotonic(), -1
        while True:
            with self._changed:
                began, failure = self._began, self.failure
                if failure:
                    raise WeightTransferError(f"{self._group} failed: {failure}")
                if began is None or began.digest != blob.digest:
                    self._changed.wait(_POLL_SECONDS * 10)
            if began is not None and began.digest == blob.digest:
                return self._open(began, blob), began.nonce
            if began is not None and began.version > blob.version:
                raise WeightTransferError(
                    f"version {blob.version} is not broadcast (any more): {began.version} is"
                )
            # While another version arrives, this one's turn is yet to come.
            arrived = 0 if self._segment is None else self._segment.num_arrived
            if arrived != moved:
                moved_at, moved = time.monotonic(), arrived
            self._check(moved_at, f"the broadcast of version {blob.version} to begin", patience)

    def await_bytes(self, segment: Segment, nonce: str, end: int, blob: Blob, patience: Patience) -> None:
        """Returns when so many bytes have arrived. Raises WeightTransferError."""
        patience.check(f"the broadcast of version {blob.version}")
        moved_at, moved = time.monotonic(), -1
        while True:
            arrived = segment.num_arrived
            if segment.nonce != nonce:
                raise WeightTransferError(f"version {blob.version} was overwritten by the next broadcast")
            if arrived >= end:
                return
            if self.failure:
                raise WeightTransferError(f"{self._group} failed: {self.failure}")
            if arrived != moved:
                moved_at, moved = time.monotonic(), arrived
            self._check(moved_at, f"the broadcast of version {blob.version}", patience)
            time.sleep(_POLL_SECONDS)

    def _check(self, moved_at: float, waiting_for: str, patience: Patience) -> None:
        patience.check(waiting_for)
        if time.monotonic() - moved_at > self._timeout_seconds:
            raise WeightTransferError(
                f"nothing arrived for {self._timeout_seconds:.1f} s while waiting for {waiting_for}"
            )

    def _open(self, began: Event, blob: Blob) -> Segment:
        segment = open_segment(SharedMemoryMedium(name=began.segment, nonce=began.nonce), blob.num_bytes)
        self._segment = segment
        return segment

    def _on_event(self, event: Event) -> None:
        with self._changed:
            match event.kind:
                case EventKind.BEGAN:
                    self._began = event
                case EventKind.FAILED | EventKind.ENDED:
                    if not self.failure:
                        self.failure = event.message
                        _log.info("%s ended here: %s", self._group, event.message)
            self._changed.notify_all()
