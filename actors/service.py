"""One actor: one engine, many rollouts, one session with the learner.

task        consumes            waits for                     woken by
watch       directives          the learner                   a version, a hold, a revocation, a drain
install     announced versions  an announcement               watch
lease       free capacity       leases                        the learner, an install, a finished rollout
rollout     one lease           engine and environment        their answers
uplink      finished rollouts   credits, acknowledgements     rollouts, the learner
heartbeat   progress            its interval                  the clock
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter

import grpc

from actors.engine_faults import EngineFaults
from actors.engines.base import Engine
from actors.heartbeat import Heartbeat
from actors.install import Installer
from actors.rollout import Player, Progress, Running
from actors.session import Session, translate
from actors.streaming import Streamer
from actors.uplink import Uplink
from penstock.codec import (
    checksum,
    invitation_from_wire,
    lease_from_wire,
    partial_to_wire,
    trajectory_item,
    version_from_wire,
    version_to_wire,
)
from penstock.errors import (
    EngineFault,
    EnvironmentFault,
    EnvironmentFull,
    FaultKind,
    NoProgress,
    PeerLost,
    PenstockError,
)
from penstock.rpc import MAX_MESSAGE_BYTES, to_duration, to_seconds
from penstock.signals import Stop
from penstock.tasks import task_group, unless_stopped
from penstock.trajectory import Lease, Pin, PolicyVersion, Trajectory
from penstock.v1 import coordinator_pb2 as pb
from penstock.waits import Waits
from penstock.watchdog import Watchdog, watch_loop
from penstock.weights.media.collective import CollectiveReceiver

_log = logging.getLogger(__name__)

LEASE_WAIT_SECONDS = 10.0
_FINISH_SECONDS = 2.0
_RETURN_SECONDS = 2.5
_FLUSH_SECONDS = 3.0
_GATHER_SECONDS = 0.03
"""For rollouts that end together: there are more of them than the engine has slots, so that it does not wait."""
LOOP_SECONDS = 120.0
"""An event loop that does not turn for this long is dead."""
DRAIN_LIMIT_SECONDS = 60.0
"""Of a drain that should take less than ten."""
MAX_ITEM_BYTES = MAX_MESSAGE_BYTES - 64 * 1024
"""Beside it, a message holds a session's id and little else."""


class PinLost(PenstockError):
    """An evaluation's rollout cannot be of its version to the end. Nobody's fault: another actor plays it."""


def _checked(item: pb.SubmitItem) -> pb.SubmitItem:
    """An item that fits into a message. Raises EnvironmentFault."""
    if item.ByteSize() > MAX_ITEM_BYTES:
        raise EnvironmentFault(
            f"the trajectory has {item.ByteSize()} bytes; a message holds {MAX_ITEM_BYTES}: lower max_tokens, or "
            "have the environment write less",
            kind=FaultKind.DATA,
        )
    return item


class Actor:
    """Generates until it is stopped, the run is finished, or the learner is gone for good."""

    def __init__(
        self,
        *,
        session: Session,
        engine: Engine,
        installer: Installer,
        uplink: Uplink,
        players: dict[str, Player],
        run_id: str,
        heartbeat_seconds: float,
        stop: Stop,
        stream_tokens: int = 0,
        waits: Waits | None = None,
        groups: CollectiveReceiver | None = None,
    ) -> None:
        """groups: that versions are broadcast to, if the actor may join some."""
        self.session = session
        self._groups = groups
        self.engine = engine
        self.installer = installer
        self.uplink = uplink
        self._players = players
        self._run_id = run_id
        self._stop = stop
        self.waits = waits or Waits()
        self._failure: NoProgress | None = None
        self._running: dict[str, Running] = {}
        self._engine_faults = EngineFaults()
        self._heartbeat = Heartbeat(
            session=session,
            engine=engine,
            installer=installer,
            uplink=uplink,
            players=players,
            running=self._running,
            waits=self.waits,
            streamer=Streamer(every_tokens=stream_tokens),
            seconds=heartbeat_seconds,
            on_standstill=self._give_up,
        )
        self._room = asyncio.Event()
        self.counts: Counter[str] = Counter()
        self._engine_started = False
        # Some rollouts wait for their environment while others decode.
        self._capacity = engine.num_slots + max(engine.num_slots // 4, 1)
        installer.may_install = self._may_install

    @property
    def num_rollouts(self) -> int:
        return len(self._running)

    @property
    def state(self) -> str:
        if self._stop.is_set():
            return "draining"
        if not self._engine_started:
            return "starting the engine"
        return "fetching weights" if self.installer.installed is None else "generating"

    @property
    def installed(self) -> PolicyVersion | None:
        return None if self.installer.installed is None else self.installer.installed[0]

    def held_leases(self) -> list[str]:
        return [*self._running, *self.uplink.held_leases()]

    async def run(self, watchdog: Watchdog | None = None) -> None:
        """Starts the engine and runs it. Raises SessionFenced, LearnerUnreachable, ProtocolError,
        ConfigError, EngineFault, NoProgress.

        watchdog: ends the process should its event loop, or its drain, stand still.
        """
        async with task_group() as tasks:
            if watchdog is not None:
                tasks.create_task(
                    watch_loop(watchdog, self._stop, seconds=LOOP_SECONDS), name="watch the loop"
                )
            background = [
                tasks.create_task(work, name=name)
                for name, work in (
                    ("watch", self._watch()),
                    ("install", self._install()),
                    ("uplink", self.uplink.run()),
                    ("heartbeat", self._heartbeat.run()),
                )
            ]
            await self._lease(tasks)
            if watchdog is not None:
                watchdog.arm("the drain", DRAIN_LIMIT_SECONDS)
            await self._drain()
            for task in background:
                task.cancel()
        if self._failure is not None:
            raise self._failure

    async def _install(self) -> None:
        """Starts the engine, which may take a minute; heartbeats go on meanwhile."""
        await self.engine.start()
        self._engine_started = True
        await self.installer.run()

    # -- leases -------------------------------------------------------------------------

    async def _lease(self, tasks: asyncio.TaskGroup) -> None:
        """Keeps rollouts running, as many as there is room for, until the stop."""
        while not self._stop.is_set():
            change = self.installer.installed_event
            free = self._num_wanted - len(self._running)
            if self.installer.turns_back and self._running:
                self._room.clear()
                with self.waits.on(
                    "its rollouts to end, to evaluate an older version",
                    owner="this actor",
                    limit_seconds=self.installer.hold_seconds,
                ):
                    await self._wait(self._room, LEASE_WAIT_SECONDS)
            elif self.installer.turns_back:
                await self._wait(change, LEASE_WAIT_SECONDS)
            elif self.installer.installed is None:
                with self.waits.on("weights", owner="the learner", limit_seconds=LEASE_WAIT_SECONDS):
                    await self._wait(change, LEASE_WAIT_SECONDS)
            elif free <= 0:
                self._room.clear()
                await self._wait(self._room, LEASE_WAIT_SECONDS)
                # Siblings end together: one question for all of them.
                await asyncio.sleep(_GATHER_SECONDS)
            else:
                with self.waits.on("a lease", owner="the learner", limit_seconds=LEASE_WAIT_SECONDS):
                    leases = await unless_stopped(self._acquire(free), self._stop, name="acquire leases")
                for lease in leases or ():
                    self._start(tasks, lease)
                if not leases:
                    await self._wait(change, 0.5)

    @property
    def _num_wanted(self) -> int:
        """Rollouts at once: no more than there are sessions for, as far as the environments have told."""
        num_sessions = [player.max_sessions for player in self._players.values()]
        if not num_sessions or None in num_sessions:
            return self._capacity
        return min(self._capacity, sum(filter(None, num_sessions)))

    async def _acquire(self, max_leases: int) -> list[Lease]:
        assert self.installer.installed is not None
        version, digest = self.installer.installed
        request = pb.AcquireLeasesRequest(
            max_leases=max_leases,
            installed=version_to_wire(version),
            installed_digest=digest,
            wait=to_duration(LEASE_WAIT_SECONDS),
        )

        async def acquire(session_id: str) -> pb.AcquireLeasesResponse:
            request.session_id = session_id
            answer: pb.AcquireLeasesResponse = await self.session.stub.AcquireLeases(
                request, timeout=LEASE_WAIT_SECONDS + 10.0
            )
            return answer

        answer = await self.session.call(acquire)
        if answer.reason:
            _log.debug("no lease: %s", answer.reason)
        return [lease_from_wire(lease) for lease in answer.leases]

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        """Waits for an event, the stop, or `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await unless_stopped(event.wait(), self._stop, name="wait")

    # -- rollouts -----------------------------------------------------------------------

    def _may_install(self, version: PolicyVersion) -> bool:
        """Pinned rollouts keep their version to their end; no rollout goes back to an older one."""
        installed = self.installer.installed
        if installed is not None and version < installed[0] and self._running:
            return False
        pins = (running.lease.pin for running in self._running.values())
        return all(pin is None or pin.version == version for pin in pins)

    def _start(self, tasks: asyncio.TaskGroup, lease: Lease) -> None:
        progress = Progress()
        task = tasks.create_task(self._play(lease, progress), name=f"rollout {lease.lease_id}")
        self._running[lease.lease_id] = Running(lease, progress, task, began=time.monotonic())
        # Of a task that is cancelled before its first step, no line runs.
        task.add_done_callback(lambda _: self._forget(lease.lease_id))

    def _forget(self, lease_id: str) -> None:
        if self._running.pop(lease_id, None) is not None:
            self._room.set()
            self.installer.look()

    async def _play(self, lease: Lease, progress: Progress) -> None:
        """One rollout, to the item that ends its lease. A fault ends the lease, not the actor."""
        item = pb.SubmitItem()
        try:
            player = self._players.get(lease.task.environment)
            if player is None:
                raise EnvironmentFault(
                    f"the learner named no address for environment {lease.task.environment!r}"
                )
            session_id = f"{self._run_id}.{'e' if lease.pin else ''}{lease.group_id}.{lease.slot}"
            if lease.rival:
                session_id += f".{lease.attempt}"
            if lease.pin is None:
                trajectory = await player.play(lease, session_id, progress)
            else:
                trajectory = await self._play_pinned(lease.pin, player, lease, session_id, progress)
            item = _checked(trajectory_item(trajectory))
            self.counts["finished"] += 1
            self._engine_faults.finished()
        except asyncio.CancelledError:
            running = self._running[lease.lease_id]
            if not (running.revoked or self._stop.is_set()):
                raise
            item.release.CopyFrom(self._release(lease, pb.RELEASE_REASON_DRAINING, "the actor drains"))
            if lease.pin is None and not running.revoked:
                self._hand_over(item, progress)
        except EnvironmentFull as full:
            # Others have its room: whoever finds some plays it.
            item.release.CopyFrom(self._release(lease, pb.RELEASE_REASON_DRAINING, str(full)))
        except EnvironmentFault as fault:
            is_data = fault.kind is FaultKind.DATA
            reason = pb.RELEASE_REASON_DATA if is_data else pb.RELEASE_REASON_INFRASTRUCTURE
            item.release.CopyFrom(self._release(lease, reason, str(fault)))
        except EngineFault as fault:
            item.release.CopyFrom(self._release(lease, pb.RELEASE_REASON_ENGINE, str(fault)))
            self._note_engine_fault(self._running[lease.lease_id].began, fault)
        except PinLost as lost:
            item.release.CopyFrom(self._release(lease, pb.RELEASE_REASON_DRAINING, str(lost)))
        try:
            with self.waits.on(
                "room in the spool", owner="the learner", limit_seconds=self.session.patience_seconds
            ):
                spooled = await self.uplink.put(lease.lease_id, item)
            if not spooled:
                self.counts["unsent"] += 1
                _log.warning("lease %s ended after the uplink was closed: its item is lost", lease.lease_id)
        finally:
            # Also when the lease is revoked while the spool is full.
            self._forget(lease.lease_id)

    def _note_engine_fault(self, began: float, fault: EngineFault) -> None:
        """An engine that finishes nothing any more would end every lease that it is given."""
        is_broken = self._engine_faults.failed(began=began, now=time.monotonic())
        if is_broken and not self._stop.is_set():
            self._give_up(NoProgress(f"the engine fails one rollout after the other: {fault}"))

    def _hand_over(self, item: pb.SubmitItem, progress: Progress) -> None:
        """Adds to a release what another actor may go on from."""
        payload = b"" if progress.partial is None else partial_to_wire(progress.partial).SerializeToString()
        if payload and len(payload) < MAX_ITEM_BYTES:
            self.counts["handed_over"] += 1
            item.release.partial, item.checksum = payload, checksum(payload)

    async def _play_pinned(
        self, pin: Pin, player: Player, lease: Lease, session_id: str, progress: Progress
    ) -> Trajectory:
        """For an evaluation. Raises PinLost, EnvironmentFault, EngineFault."""
        try:
            async with asyncio.timeout(pin.limit_seconds):
                # Else it would be granted and given back again and again while the engine prepares a switch.
                await self.installer.settled()
                if not self.installer.generates(pin.version):
                    raise PinLost(
                        f"the actor went on from version {pin.version} while the lease was on its way"
                    )
                trajectory = await player.play(lease, session_id, progress)
        except TimeoutError:
            raise PinLost(f"the evaluation was over after {pin.limit_seconds:.0f} s") from None
        if any(span.version != pin.version for span in trajectory.versions):
            raise EngineFault(
                f"the engine sampled versions {', '.join(str(s.version) for s in trajectory.versions)} while "
                f"{pin.version} was held"
            )
        return trajectory

    def _release(self, lease: Lease, reason: pb.ReleaseReason.ValueType, message: str) -> pb.Release:
        name = pb.ReleaseReason.Name(reason).removeprefix("RELEASE_REASON_").lower()
        if self._running[lease.lease_id].revoked:
            reason, name = pb.RELEASE_REASON_REVOKED, "revoked"
        self.counts[name] += 1
        if name not in ("revoked", "draining"):
            _log.warning("lease %s ended by %s fault: %s", lease.lease_id, name, message)
        return pb.Release(lease_id=lease.lease_id, reason=reason, message=message[:500])

    # -- directives ----------------------------------------------------------------------

    async def _watch(self) -> None:
        given_up_at = time.monotonic() + self.session.patience_seconds
        while not self._stop.is_set():
            session_id = self.session.session_id
            was_heard = False
            try:
                async for directive in self.session.stub.Watch(pb.WatchRequest(session_id=session_id)):
                    was_heard = True
                    self._obey(directive)
                problem: PenstockError = PeerLost("the learner closed the watch stream")
            except grpc.aio.AioRpcError as error:
                problem = translate(error)
            if was_heard:
                # Until now: a stream may be quiet for as long as there is nothing to tell.
                given_up_at = time.monotonic() + self.session.patience_seconds
            if not self._stop.is_set():
                await self.session.recover(problem, session_id, given_up_at)

    def _obey(self, directive: pb.WatchResponse) -> None:
        match directive.WhichOneof("directive"):
            case "version":
                self.installer.announce(directive.version)
            case "revoke":
                self._revoke(directive.revoke)
            case "group":
                if self._groups is not None:
                    self._groups.invite(invitation_from_wire(directive.group))
            case "hold":
                self._hold(directive.hold)
            case "drain":
                _log.info("the learner asks to drain: %s", directive.drain.reason)
                self._stop.set(directive.drain.reason)

    def _hold(self, hold: pb.Hold) -> None:
        if not hold.HasField("version"):
            self.installer.let_go()
            return
        manifest = hold.manifest if hold.HasField("manifest") else None
        self.installer.hold(version_from_wire(hold.version), manifest, seconds=to_seconds(hold.limit))

    def _revoke(self, revoke: pb.RevokeLeases) -> None:
        for lease_id in revoke.lease_ids:
            running = self._running.get(lease_id)
            if running is not None:
                running.revoked = True
                running.task.cancel()

    # -- leaving ------------------------------------------------------------------------

    def _give_up(self, failure: NoProgress) -> None:
        """Ends the actor, in order: what it holds is played elsewhere."""
        self._failure = failure
        self._stop.set(str(failure))

    async def _drain(self) -> None:
        """Finishes what ends soon, returns the rest, and says goodbye: under 10 s in all."""
        tasks = [running.task for running in self._running.values()]
        _log.info("draining: %d rollouts running", len(tasks))
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_FINISH_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_RETURN_SECONDS)
        if not await self.uplink.flush(_FLUSH_SECONDS):
            _log.warning("%d items were not acknowledged and are lost", self.uplink.num_unacknowledged)
        await self.uplink.close()
        await self.session.leave(self._stop.reason)
