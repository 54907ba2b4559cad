"""The scheduler, its ledger, and everybody who waits for either."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Callable

from learner.config import DiskConfig
from learner.coordinator.decisions import Revocation
from learner.coordinator.disk import DiskGuard, Reading, Room
from learner.coordinator.evaluation.log import EvaluationLog
from learner.coordinator.evaluation.records import EvaluationAnswered, EvaluationLeaseGranted
from learner.coordinator.explain import TrainerWait, why
from learner.coordinator.ledger import CannotOpen, Ledger, Totals
from learner.coordinator.records import (
    EventLogged,
    GroupOpened,
    ItemsRefused,
    LeaseGranted,
    Record,
    SequenceAdvanced,
    SessionOpened,
    TrajectoryState,
    TrajectoryStored,
)
from learner.coordinator.scheduler import Scheduler
from learner.coordinator.vigil import Vigil
from penstock.errors import LedgerError
from penstock.signals import Stop
from penstock.tasks import unless_stopped
from penstock.watchdog import Watchdog

TICK_SECONDS = 1.0
STANDSTILL_SECONDS = 120.0
"""An event loop that does not turn, or a commit that is not done, for this long is dead."""
NO_PROGRESS_SECONDS = 60.0
"""Of the learner's waiting while no slot is filled, until there is an event."""

NO_LIMITS = DiskConfig(warn_at=1.0, stop_leases_at=1.0, end_run_at=1.0, ballast_bytes=0)
"""For ledgers that fill a disk to its end."""

_log = logging.getLogger(__name__)


class Pulse:
    """Wakes all who wait, each time something changed.

    Take `next()` before looking at the state, then wait for it: no change is missed.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        return self._event


async def wait_until(event: asyncio.Event, deadline: float) -> bool:
    """Waits for an event until a reading of `time.monotonic`; False if the deadline came first."""
    try:
        async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
            await event.wait()
    except TimeoutError:
        return False
    return True


class Coordinator:
    """What the gRPC services share: decide, write down, answer."""

    def __init__(
        self,
        scheduler: Scheduler,
        ledger: Ledger,
        stop: Stop,
        *,
        run_id: str,
        disk: DiskConfig = NO_LIMITS,
        on_full_disk: Callable[[LedgerError], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_id = run_id
        self.scheduler = scheduler
        self.ledger = ledger
        self.stop = stop
        self.clock = clock
        self.started_at = clock()
        self.changed = Pulse()
        """Each commit."""
        self.news = Pulse()
        """What many actors wait for: versions, directives, room for leases. Not the commits that they cause."""
        self._ticked = asyncio.Event()
        self.trainer: TrainerWait | None = None
        self.checkpoint_requested = False
        self.step_metrics: dict[str, float] = {}
        self.totals = ledger.totals()
        self._disk = DiskGuard(disk)
        self._on_full_disk = on_full_disk
        self.watchdog: Watchdog | None = None
        """Ends the process should a commit never end."""
        self._vigil = Vigil(seconds=NO_PROGRESS_SECONDS)
        self._revocations: defaultdict[str, list[Revocation]] = defaultdict(list)
        self._evaluation_log = EvaluationLog(ledger.path.parent)

    async def commit(self) -> None:
        """Returns once all that was decided so far is on disk. Raises LedgerError."""
        await self.begin_commit()

    def begin_commit(self, *, all_is_news: bool = False) -> asyncio.Future[None]:
        """Hands all that was decided so far to the ledger, in the order of the decisions.

        Done once it is on disk; then wakes who waits for it. all_is_news: also the actors,
        whatever it was.
        """
        revocations, records = self.scheduler.take_revocations(), self.scheduler.take_records()
        for revocation in revocations:
            self._revocations[revocation.session_id].append(revocation)
        is_news = bool(revocations) or any(map(_is_news, records)) or (all_is_news and bool(records))
        written = self.ledger.begin_write(records)
        written.add_done_callback(lambda _: self.announce() if is_news else self.changed.fire())
        return written

    def announce(self) -> None:
        """Wakes everybody."""
        self.changed.fire()
        self.news.fire()

    def take_revocations(self, session_id: str) -> list[Revocation]:
        return self._revocations.pop(session_id, [])

    def why(self) -> list[str]:
        return why(self.scheduler, self.trainer, self.clock())

    def actors_wanted(self) -> int:
        num_slots = [session.info.num_slots for session in self.scheduler.fleet.sessions()]
        return self.scheduler.demand.wanted(num_slots, finished=self.scheduler.finished)

    def tokens_per_second(self) -> float:
        return sum(session.stats.tokens_per_second for session in self.scheduler.fleet.sessions())

    async def refresh_totals(self) -> Totals:
        """Counts anew, to be displayed; a ledger that cannot be opened now leaves the count that there was.

        Raises LedgerError for one that is damaged.
        """
        try:
            self.totals = await asyncio.to_thread(self.ledger.totals)
        except CannotOpen as error:
            _log.warning("the totals stay as they were: %s", error)
        return self.totals

    def note_disk(self, reading: Reading) -> None:
        """Stops or allows leases by the room that the ledger's disk has; ends the run when there is none."""
        event = self._disk.note(reading)
        if event is not None:
            _log.warning("%s", event)
            self.scheduler.note_event("disk", event)
            if self._disk.room is Room.NONE:
                self._on_full_disk(LedgerError(event))
        stops = self._disk.room in (Room.NO_LEASES, Room.NONE)
        self.scheduler.set_no_room(self._disk.describe(reading) if stops else "")

    async def tick_forever(self) -> None:
        """Ends what is past its deadline, once a second, until the stop.

        Waits for nothing but the clock: a late tick means that the process stood still, and
        deadlines move by that much. A slow disk must not look like it.
        """
        # From here on a stall is noticed, even one within the first second.
        self.scheduler.tick(self.clock())
        while not await self.stop.sleep(TICK_SECONDS):
            self.scheduler.tick(self.clock())
            self._keep_vigil()
            self._ticked.set()
        self.announce()

    def _keep_vigil(self) -> None:
        waiting = self.trainer is not None and self.trainer.waiting is not None
        waiting = waiting and not (self.scheduler.finished or self.scheduler.paused)
        num_moves = self.scheduler.docket.num_filled + self.scheduler.evaluations.num_answered
        if self._vigil.is_news(waiting=waiting, num_moves=num_moves, now=self.clock()):
            self.scheduler.note_event("no_progress", "; ".join(self.why()[:4]))

    async def commit_ticks(self) -> None:
        """Looks at the disk, writes what ticks decided, and counts the ledger anew, until the stop."""
        self._look_at_disk()
        while await unless_stopped(self._ticked.wait(), self.stop, name="wait for a tick"):
            self._ticked.clear()
            live = {session.session_id for session in self.scheduler.fleet.sessions()}
            for gone in self._revocations.keys() - live:
                del self._revocations[gone]
            self._look_at_disk()
            if self.watchdog is not None:
                self.watchdog.arm("a commit of the ledger", STANDSTILL_SECONDS)
            await self._commit_tick()
            if self.watchdog is not None:
                self.watchdog.disarm()
            await self.refresh_totals()
        await self._commit_tick()

    async def _commit_tick(self) -> None:
        ended = self.scheduler.evaluations.take_ended()
        await self.begin_commit(all_is_news=True)
        if ended:
            await asyncio.to_thread(self._evaluation_log.append, ended)

    def _look_at_disk(self) -> None:
        usage = shutil.disk_usage(self.ledger.path.parent)
        self.note_disk(Reading(total_bytes=usage.total, free_bytes=usage.free))


def _is_news(record: Record) -> bool:
    """Whether an actor may wait for it. What actors do all the time is none: it would wake all of them."""
    if isinstance(record, TrajectoryStored):
        return record.state is not TrajectoryState.PENDING
    return type(record) not in _ORDINARY


_ORDINARY = frozenset(
    {
        *(SequenceAdvanced, LeaseGranted, GroupOpened, ItemsRefused, SessionOpened, EventLogged),
        *(EvaluationLeaseGranted, EvaluationAnswered),
    }
)
