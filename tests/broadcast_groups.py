"""Groups of real processes, without a coordinator: a sender and receivers on this host."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from penstock.broadcast.process import MemberProcess
from penstock.broadcast.words import Backend, Event, EventKind, Formation, Sending, Settings
from penstock.weights.buffer import ChunkBuffer
from penstock.weights.manifest import CollectiveMedium, Manifest, SharedMemoryMedium
from penstock.weights.media.base import Patience
from penstock.weights.media.collective import CollectiveReceiver, Invitation

SECONDS = 120.0
MEDIUM = CollectiveMedium(group="group-1")


@contextlib.contextmanager
def host_of(rank: int, device: str) -> Iterator[None]:
    """Has a member's process believe that its host, or its GPU, is its own: NCCL wants both of them apart."""
    if device == "cpu":
        yield
        return
    import torch

    gpus = [str(number) for number in range(torch.cuda.device_count())]
    changed = {"NCCL_HOSTID": f"host-{rank}", "CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def new_buffer(manifest: Manifest, buffer: ChunkBuffer | None = None) -> ChunkBuffer:
    """A buffer for a version that has none of it yet."""
    buffer = buffer or ChunkBuffer()
    buffer.prepare(manifest)
    buffer.invalidate(0, manifest.num_bytes)
    return buffer


def take(receiver: CollectiveReceiver, manifest: Manifest, buffer: ChunkBuffer | None = None) -> ChunkBuffer:
    """All chunks of a version, verified. Those that were wrong stay missing."""
    buffer = buffer or new_buffer(manifest)
    patience = Patience(deadline=time.monotonic() + SECONDS, abandoned=threading.Event())
    for index, data in receiver.chunks(manifest, MEDIUM, buffer.missing(), patience):
        buffer.put(index, data)
    return buffer


class SenderEnd:
    """A sender, and what it said."""

    def __init__(
        self,
        *,
        device: str = "cpu",
        timeout_seconds: float = 10.0,
        forming_seconds: float = SECONDS,
        piece_bytes: int = 1 << 20,
    ) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()
        settings = Settings(
            host="127.0.0.1",
            device=device,
            timeout_seconds=timeout_seconds,
            forming_seconds=forming_seconds,
            piece_bytes=piece_bytes,
        )
        with host_of(0, device):
            self.process = MemberProcess(settings, self._on_event)

    def form(self, size: int, *, group: str = "group-1", backend: Backend = Backend.GLOO) -> None:
        self.process.tell(Formation(group=group, size=size, backend=backend))

    def send(self, manifest: Manifest) -> None:
        medium = next(each for each in manifest.media if isinstance(each, SharedMemoryMedium))
        self.process.tell(
            Sending(
                epoch=manifest.version.epoch,
                step=manifest.version.step,
                digest=manifest.digest,
                num_bytes=manifest.num_bytes,
                segment=medium.name,
                nonce=medium.nonce,
            )
        )

    def next(self, *kinds: EventKind) -> Event:
        """Waits for an event of one of these kinds, and forgets it and those before it."""

        def found() -> int | None:
            return next((at for at, each in enumerate(self.events) if each.kind in kinds), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, SECONDS), (kinds, self.events)
            at = found()
            assert at is not None
            event = self.events[at]
            del self.events[: at + 1]
            return event

    def _on_event(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()


def invitation(
    port: int,
    rank: int,
    size: int,
    *,
    group: str = "group-1",
    backend: Backend = Backend.GLOO,
    timeout_seconds: float = 10.0,
    piece_bytes: int = 1 << 20,
) -> Invitation:
    return Invitation(
        group=group,
        port=port,
        rank=rank,
        size=size,
        backend=backend,
        piece_bytes=piece_bytes,
        timeout_seconds=timeout_seconds,
        forming_seconds=SECONDS,
    )


@dataclass
class ObservedMember:
    """Starts members and notes what they tell; `on_event` may interfere."""

    on_event: Callable[[MemberProcess, Event], None] = lambda process, event: None
    started: list[MemberProcess] = field(default_factory=list)
    began: list[Event] = field(default_factory=list)

    def __call__(self, settings: Settings, on_event: Callable[[Event], None]) -> MemberProcess:
        def observe(event: Event) -> None:
            if event.kind == EventKind.BEGAN:
                self.began.append(event)
            self.on_event(process, event)
            on_event(event)

        process = MemberProcess(settings, observe)
        self.started.append(process)
        return process


class Group:
    """A sender and its receivers, come together; unless `size` says that more were to come."""

    def __init__(
        self,
        num_receivers: int,
        *,
        backend: Backend = Backend.GLOO,
        device: str = "cpu",
        timeout_seconds: float = 10.0,
        forming_seconds: float = SECONDS,
        piece_bytes: int = 1 << 20,
        size: int = 0,
        on_event: Callable[[int, MemberProcess, Event], None] = lambda rank, process, event: None,
    ) -> None:
        self.sender = SenderEnd(
            device=device,
            timeout_seconds=timeout_seconds,
            forming_seconds=forming_seconds,
            piece_bytes=piece_bytes,
        )
        port = self.sender.next(EventKind.LISTENING).port
        self.members: list[ObservedMember] = []
        self.receivers: list[CollectiveReceiver] = []
        size = size or num_receivers + 1
        for rank in range(1, num_receivers + 1):
            observed = ObservedMember(lambda process, event, rank=rank: on_event(rank, process, event))
            receiver = CollectiveReceiver(host="127.0.0.1", device=device, start=observed)
            told = invitation(
                port,
                rank,
                size,
                backend=backend,
                timeout_seconds=timeout_seconds,
                piece_bytes=piece_bytes,
            )
            with host_of(rank, device):
                receiver.invite(told)
            self.members.append(observed)
            self.receivers.append(receiver)
        self.sender.form(size, backend=backend)
        if size == num_receivers + 1:
            event = self.sender.next(EventKind.FORMED, EventKind.FAILED, EventKind.ENDED)
            assert event.kind == EventKind.FORMED, event

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()
        self.sender.process.kill()
