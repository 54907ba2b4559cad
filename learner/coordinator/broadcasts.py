"""Broadcasts of versions to a group of actors: senders are started, told what to send, and ended.

A sender is a process, of one group, that reads the trainer's segment: neither the trainer nor this
process takes part in a collective, and publishing waits for none. membership.py decides who is in
a group; whatever becomes of it, every version can be pulled.

    consumes     published versions, the fleet, what senders tell
    waits for    a group to form, a broadcast to move; each until a deadline, then the sender is killed
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from learner.config import WeightsConfig
from learner.coordinator.core import Coordinator
from learner.coordinator.fleet import ActorState, Session
from learner.coordinator.membership import Candidate, Group, Membership
from penstock.broadcast.process import Member, MemberProcess, StartMember
from penstock.broadcast.words import Event, EventKind, Formation, Reason, Sending, Settings
from penstock.rpc import to_duration
from penstock.v1 import coordinator_pb2, operator_pb2
from penstock.weights.manifest import CollectiveMedium, Manifest, SharedMemoryMedium, WeightsMedium

_log = logging.getLogger(__name__)

PIECE_BYTES = 8 * 1024 * 1024
_LOOK_SECONDS = 0.2
_BLAME_SECONDS = 10.0
"""After a failure, until the sender has told at whose fault."""
_GRACE = 2.0
"""A sender has so many times a wait's length to end it by itself."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Sender:
    """A process and what it does."""

    process: Member
    heard_at: float
    port: int = 0
    group: Group | None = None
    is_formed: bool = False
    sending: Sending | None = None
    since: float = 0.0
    num_bytes: int = 0
    queued: Sending | None = None
    failed: bool = False
    retiring: bool = False
    """Its group has a successor: it ends after what it sends now."""


class Broadcasts:
    """Used by the event loop alone."""

    def __init__(
        self,
        coordinator: Coordinator,
        config: WeightsConfig,
        *,
        host: str,
        device: str,
        start: StartMember = MemberProcess,
    ) -> None:
        """
        host: the learner's own, as it is bound.
        device: of the sender, "auto" for a GPU if there is one.
        """
        self._coordinator = coordinator
        self._config = config
        self._host = host
        self._device = device
        self._start = start
        self.membership = Membership(config)
        self._senders: list[_Sender] = []

    async def run(self) -> None:
        """Until the stop."""
        if self._config.medium is WeightsMedium.PULL:
            return
        while not await self._coordinator.stop.sleep(_LOOK_SECONDS):
            self._look()

    def close(self) -> None:
        while self._senders:
            self._senders.pop().process.kill()

    # -- versions -----------------------------------------------------------------------

    def offer(self, manifest: Manifest) -> tuple[CollectiveMedium, ...]:
        """Begins to broadcast a version, if there is a group. Returns how its members get it."""
        sender, group = self._standing(), self.membership.standing
        # Low-rank factors are pulled: they are small, and what they make of the base is not.
        if sender is None or group is None or manifest.adapter is not None:
            return ()
        segment = next((each for each in manifest.media if isinstance(each, SharedMemoryMedium)), None)
        if segment is None:
            return ()
        sending = Sending(
            epoch=manifest.version.epoch,
            step=manifest.version.step,
            digest=manifest.digest,
            num_bytes=manifest.num_bytes,
            segment=segment.name,
            nonce=segment.nonce,
        )
        if sender.sending is None:
            self._send(sender, sending)
        else:
            sender.queued = sending
        return (CollectiveMedium(group=group.name),)

    def invitation(self, session_id: str) -> coordinator_pb2.GroupInvitation | None:
        """To the group that forms."""
        group, sender = self.membership.forming, self._forming()
        rank = None if group is None else group.rank(session_id)
        if group is None or sender is None or rank is None:
            return None
        return coordinator_pb2.GroupInvitation(
            group=group.name,
            port=sender.port,
            rank=rank,
            size=group.size,
            backend=group.backend,
            piece_bytes=PIECE_BYTES,
            timeout=to_duration(self._config.timeout_seconds),
            forming=to_duration(self._config.forming_seconds),
        )

    # -- what operators see -------------------------------------------------------------

    def status(self) -> operator_pb2.BroadcastStatus:
        membership = self.membership
        group = membership.standing
        return operator_pb2.BroadcastStatus(
            state=self._state(),
            num_members=0 if group is None else len(group.seats),
            backend="" if group is None else group.backend,
            num_groups=membership.num_groups,
            num_broadcasts=membership.num_broadcasts,
            fallbacks={str(reason): count for reason, count in membership.fallbacks.items()},
            last_failure=membership.last_failure,
        )

    def why(self) -> Iterator[str]:
        """What is waited for: a group that forms, a broadcast that runs."""
        now = self._coordinator.clock()
        for sender in self._senders:
            group = sender.group
            if group is not None and sender.sending is not None:
                left = max(self._config.timeout_seconds - (now - sender.heard_at), 0.0)
                yield (
                    f"version {sender.sending.version} is broadcast to {len(group.seats)} actors since "
                    f"{now - sender.since:.1f} s: {sender.num_bytes / 1e6:.0f} of "
                    f"{sender.sending.num_bytes / 1e6:.0f} MB sent; should nothing move for {left:.1f} s, they pull"
                )
            elif group is not None and not sender.is_formed:
                left = max(self._config.forming_seconds - (now - sender.heard_at), 0.0)
                yield (
                    f"a group of {len(group.seats)} actors forms, for versions to be broadcast to; given up in "
                    f"{left:.0f} s; versions are pulled meanwhile"
                )

    def _state(self) -> str:
        if self._config.medium is WeightsMedium.PULL:
            return "off"
        if self.membership.standing is None:
            return "none" if self.membership.forming is None else "forming"
        return "standing" if all(each.sending is None for each in self._senders) else "sending"

    # -- groups -------------------------------------------------------------------------

    def _look(self) -> None:
        now = self._coordinator.clock()
        self.membership.look([self._candidate(session, now) for session in self._sessions()], now)
        for sender in list(self._senders):
            self._end_if_overdue(sender, now)
        for sender in list(self._senders):
            if sender.group is not None and not sender.failed and sender.sending is None:
                self._end_if_left(sender, sender.group)
        # One that failed is yet to tell at whose fault.
        is_settled = all(each.is_formed and not each.failed for each in self._senders)
        if is_settled and self.membership.wants_group(now):
            self._start_sender(now)

    def _sessions(self) -> list[Session]:
        return self._coordinator.scheduler.fleet.sessions()

    def _candidate(self, session: Session, now: float) -> Candidate:
        state = self._coordinator.scheduler.fleet.state(session, now)
        return Candidate(
            session_id=session.session_id,
            actor_id=session.info.actor_id,
            medium=session.info.weights_medium,
            device=session.info.device,
            is_ready=state is ActorState.READY,
            is_local=session.info.hostname == socket.gethostname(),
        )

    def _start_sender(self, now: float) -> None:
        settings = Settings(
            host=self._host,
            device=self._device,
            timeout_seconds=self._config.timeout_seconds,
            forming_seconds=self._config.forming_seconds,
            piece_bytes=PIECE_BYTES,
        )
        loop = asyncio.get_running_loop()
        known: list[_Sender] = []

        def on_event(event: Event) -> None:
            loop.call_soon_threadsafe(lambda: self._on_event(known[0], event))

        known.append(_Sender(process=self._start(settings, on_event), heard_at=now))
        self._senders.append(known[0])

    def _end_if_left(self, sender: _Sender, group: Group) -> None:
        """A group with a member that has left cannot broadcast; nothing is being sent."""
        gone = self.membership.has_left(group)
        if gone:
            _log.info("%s ends: %s left it", group.name, ", ".join(gone))
            self.membership.retired(group)
            self._end(sender)

    def _end_if_overdue(self, sender: _Sender, now: float) -> None:
        """The last resort: senders end what takes too long by themselves."""
        if sender.failed:
            limit = _BLAME_SECONDS
        elif sender.is_formed:
            limit = self._config.timeout_seconds if sender.sending is not None else float("inf")
        else:
            limit = self._config.forming_seconds
        if now - sender.heard_at > _GRACE * limit:
            if not sender.failed:
                self._fail(
                    sender, Reason.SENDER, f"its process said nothing for {now - sender.heard_at:.0f} s"
                )
            self._end(sender)

    def _on_event(self, sender: _Sender, event: Event) -> None:
        if sender not in self._senders:
            return
        sender.heard_at = self._coordinator.clock()
        match event.kind:
            case EventKind.LISTENING:
                self._invite(sender, event)
            case EventKind.FORMED:
                self._stands(sender)
            case EventKind.MOVED:
                sender.num_bytes = event.num_bytes
            case EventKind.SENT:
                self._sent(sender, event)
            case EventKind.FAILED:
                self._fail(sender, Reason(event.reason), event.message)
            case EventKind.SILENT:
                self._blame(sender, event)
            case EventKind.ENDED:
                if not sender.failed:
                    self._fail(sender, Reason.SENDER, event.message)
                self._end(sender)

    def _invite(self, sender: _Sender, event: Event) -> None:
        sender.port = event.port
        group = self.membership.form(event.device, self._coordinator.clock())
        if group is None:
            self._end(sender)
            return
        sender.group = group
        sender.process.tell(Formation(group=group.name, size=group.size, backend=group.backend))
        _log.info("inviting %d actors to %s (%s)", len(group.seats), group.name, group.backend)
        self._coordinator.announce()

    def _stands(self, sender: _Sender) -> None:
        """From the next version on it takes the place of the group before."""
        before = self._standing()
        sender.is_formed = True
        self.membership.formed(self._coordinator.clock())
        assert sender.group is not None
        self._note(f"versions are broadcast to {len(sender.group.seats)} actors ({sender.group.backend})")
        if before is not None:
            before.retiring, before.queued = True, None
            if before.sending is None:
                self._end(before)

    def _sent(self, sender: _Sender, event: Event) -> None:
        if event.is_whole:
            self.membership.broadcast()
            _log.debug(
                "version %s was broadcast: %d bytes in %.2f s", event.version, event.num_bytes, event.seconds
            )
        else:
            self.membership.skipped()
        sender.sending = None
        queued, sender.queued = sender.queued, None
        if sender.retiring:
            self._end(sender)
        elif queued is not None:
            self._send(sender, queued)

    def _send(self, sender: _Sender, sending: Sending) -> None:
        sender.sending, sender.since, sender.num_bytes = sending, self._coordinator.clock(), 0
        sender.heard_at = sender.since
        sender.process.tell(sending)

    def _fail(self, sender: _Sender, reason: Reason, message: str) -> None:
        """Its members pull from now on. The process stays until it has told at whose fault."""
        self.membership.failed(sender.group, reason, message, self._coordinator.clock())
        sender.failed, sender.sending, sender.queued = True, None, None
        self._note(f"a broadcast failed, actors pull: {reason}: {message}")

    def _blame(self, sender: _Sender, event: Event) -> None:
        if sender.group is None:
            return
        self._end(sender)
        names = [sender.group.seats[rank - 1].actor_id for rank in event.ranks]
        if names:
            self._note(f"a broadcast failed because of {', '.join(names)}")
        for name in self.membership.at_fault(sender.group, event.ranks):
            self._note(f"{name} failed twice: it only pulls from now on")

    def _end(self, sender: _Sender) -> None:
        sender.process.kill()
        self._senders.remove(sender)

    def _standing(self) -> _Sender | None:
        return self._of(self.membership.standing)

    def _forming(self) -> _Sender | None:
        return self._of(self.membership.forming)

    def _of(self, group: Group | None) -> _Sender | None:
        if group is None:
            return None
        return next((each for each in self._senders if each.group is group and not each.failed), None)

    def _note(self, message: str) -> None:
        _log.info("%s", message)
        self._coordinator.scheduler.note_event("broadcast", message)
