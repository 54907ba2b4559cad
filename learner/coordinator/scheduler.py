"""The actors' side of a run: sessions and leases. Pure: no sockets, no disk, no clock.

Methods take the clock's reading and change the state at once; what happened waits in
`take_records` for the ledger, and what actors must be told in `take_revocations`. The
service writes the records before it answers anybody. What actors submit goes through
`docket`; the trainer's side is `lineage`; and all work on one `board` of open groups.

Data flow of one trajectory:

    acquire -> lease -> submit -> slot filled -> group ready -> lineage.next_batch -> published
      ^                                                                                  |
      +------------------ admission: the new version makes room for new groups ----------+
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from learner.config import BreakerConfig, FleetConfig, ScheduleConfig
from learner.coordinator.admission import Admission
from learner.coordinator.board import Board
from learner.coordinator.decisions import (
    History,
    Revocation,
)
from learner.coordinator.demand import Demand
from learner.coordinator.docket import Docket
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.coordinator.evaluation.evaluation import is_evaluation_lease
from learner.coordinator.evaluation.evaluations import Evaluations
from learner.coordinator.evaluation.plan import Plan
from learner.coordinator.fleet import ActorInfo, EnvironmentUse, Fleet, ReportedStats, Session, WeightsUse
from learner.coordinator.grants import Grants
from learner.coordinator.groups import Group, LeaseOutcome
from learner.coordinator.journal import Journal
from learner.coordinator.leases import LeaseTable, RolloutReport
from learner.coordinator.lineage import Lineage
from learner.coordinator.outages import Outages
from learner.coordinator.records import (
    PauseSet,
    Record,
    SessionClosed,
    SessionOpened,
)
from learner.coordinator.sieve import Sieve
from learner.coordinator.stragglers import Stragglers
from learner.coordinator.streams import Piece, Streams
from learner.coordinator.take_overs import TakeOvers
from learner.coordinator.tasks import TaskOrder
from learner.coordinator.validation import Limits
from penstock.trajectory import Lease, PolicyVersion, Sampling
from penstock.waits import WaitSummary

_TICK_GAP_SECONDS = 2.0


class Scheduler:
    """Sessions and their leases, with the board and the lineage of one run."""

    def __init__(
        self,
        *,
        schedule: ScheduleConfig,
        fleet: FleetConfig,
        breaker: BreakerConfig,
        sampling: Sampling,
        tasks: TaskOrder,
        limits: Limits,
        sieve: Sieve | None = None,
        evaluation: EvaluationConfig | None = None,
        plan: Plan | None = None,
        history: History,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.schedule = schedule
        self.fleet = Fleet(fleet)
        self.limits = limits
        self.paused = False
        self.no_room = ""
        """Why the ledger's disk has no room for more."""
        self.demand = Demand(schedule)
        self._config = fleet
        self._journal = Journal(wall_clock)
        admission = Admission(schedule)
        self.board = Board(
            fleet=fleet,
            admission=admission,
            streams=Streams(max_bytes=fleet.stream_bytes, max_tokens=limits.max_context),
            journal=self._journal,
            sieve=sieve,
        )
        self.lineage = Lineage(schedule=schedule, board=self.board, journal=self._journal)
        self.outages = Outages(
            environments=tasks.environments, config=breaker, board=self.board, journal=self._journal
        )
        self.evaluations = Evaluations(
            config=evaluation or EvaluationConfig(),
            plan=plan or Plan((), samples=1, seed=0, sampling=sampling),
            num_steps=schedule.num_steps,
            fleet_config=fleet,
            fleet=self.fleet,
            journal=self._journal,
            left_out=self.outages.left_out,
            was_granted=history.was_evaluation_granted,
            wall_clock=wall_clock,
        )
        self._num_sessions = 0
        self._ticked_at: float | None = None
        self._stragglers = Stragglers(fleet=fleet, board=self.board, journal=self._journal)
        self._take_overs = TakeOvers(
            board=self.board, lineage=self.lineage, limits=limits, journal=self._journal
        )
        self.docket = Docket(
            fleet=self.fleet,
            board=self.board,
            lineage=self.lineage,
            evaluations=self.evaluations,
            outages=self.outages,
            stragglers=self._stragglers,
            demand=self.demand,
            take_overs=self._take_overs,
            journal=self._journal,
            history=history,
            max_tokens=sampling.max_tokens,
        )
        self.grants = Grants(
            schedule=schedule,
            config=fleet,
            sampling=sampling,
            tasks=tasks,
            fleet=self.fleet,
            admission=admission,
            board=self.board,
            stragglers=self._stragglers,
            outages=self.outages,
            journal=self._journal,
        )

    @property
    def groups(self) -> Mapping[int, Group]:
        """Those that are open."""
        return self.board.groups

    @property
    def leases(self) -> LeaseTable:
        return self.board.leases

    @property
    def version(self) -> PolicyVersion | None:
        return self.lineage.version

    @property
    def epoch(self) -> int:
        return self.lineage.epoch

    @property
    def finished(self) -> bool:
        return self.lineage.finished

    def take_records(self) -> list[Record]:
        """What waits for the ledger."""
        return self._journal.take()

    def take_revocations(self) -> list[Revocation]:
        """What waits for the actors."""
        return self.board.take_revocations() + self.evaluations.take_revocations()

    # -- starting -----------------------------------------------------------------------

    def restore(
        self,
        *,
        epoch: int,
        from_step: int,
        num_sessions: int,
        next_group_id: int,
        open_groups: Sequence[Group],
        assigned: Sequence[int],
        live_leases: Sequence[tuple[int, int, int]],
        versions: dict[PolicyVersion, str],
        paused: bool,
        now: float,
    ) -> None:
        """Goes on from a ledger. Leases wait for their actors to join again and name them."""
        self._num_sessions, self.grants.next_group_id = num_sessions, next_group_id
        self.paused = paused
        self.docket.restore()
        self.board.hold(open_groups, given=assigned)
        self.lineage.restore(epoch=epoch, from_step=from_step, versions=versions, assigned=assigned)
        for group_id, slot, attempt in live_leases:
            held = self.groups[group_id].slots[slot]
            if held.filled is not None:
                continue
            lease = self.leases.grant(group_id=group_id, slot=slot, attempt=attempt, session_id="", now=now)
            held.lease_ids.append(lease.lease_id)
            lease.deadline = now + self._config.dead_seconds
        for group in list(self.groups.values()):
            # Only of a run that goes on with smaller budgets of faults.
            if group.is_settled and not group.is_ready:
                self.board.end_if_useless(group)

    # -- sessions -----------------------------------------------------------------------

    def join(
        self,
        session_id: str,
        info: ActorInfo,
        held: Sequence[str],
        now: float,
        *,
        installed: PolicyVersion | None = None,
    ) -> Session:
        """Opens a session; an older one of the same actor is fenced. Raises FleetFull.

        held: leases that it still works on. installed: what it generates with, if it joins again.
        """
        self.fleet.admit(info.actor_id, now)
        older = self.fleet.of_actor(info.actor_id)
        self._num_sessions += 1
        session = self.fleet.join(session_id, self._num_sessions, info, now)
        session.installed = installed
        self._journal.record(
            SessionOpened(session_id=session_id, actor_id=info.actor_id, number=session.number)
        )
        self._journal.event("joined", f"{info.actor_id} ({info.engine}, {info.num_slots} slots)")
        for lease_id in held:
            if is_evaluation_lease(lease_id):
                self.evaluations.adopt(lease_id, session, now)
            else:
                self.leases.adopt(lease_id, session_id, now)
        if older is not None:
            self._end_session(older, LeaseOutcome.DEAD, "replaced")
            self.fleet.fence(older.session_id, session_id)
        self.evaluations.joined(session, now)
        return session

    def heartbeat(
        self,
        session_id: str,
        *,
        installed: PolicyVersion | None,
        stats: ReportedStats,
        progress: Sequence[RolloutReport],
        now: float,
        waits: Sequence[WaitSummary] = (),
        num_unacknowledged: int = 0,
        uses: Sequence[EnvironmentUse] = (),
        weights: WeightsUse | None = None,
    ) -> None:
        """Keeps a session alive.

        progress: of every lease that the actor holds. One that it doesn't name some time after
        the grant was lost on the way, and is free again. uses: of each environment.
        """
        session = self.fleet.require(session_id, now)
        session.installed, session.stats = installed, stats
        session.waits, session.num_unacknowledged = tuple(waits), num_unacknowledged
        session.weights = weights or session.weights
        for report in progress:
            self.leases.progress(report, session_id, now)
        self.evaluations.heartbeat(session, progress, now)
        for use in uses:
            num_answers, seconds = session.note_use(use)
            self.outages.answered(use.environment, num_answers, seconds)
        named = {report.lease_id for report in progress}
        for lease in self.leases.of_session(session_id):
            if lease.lease_id not in named and now - lease.granted_at > self._config.suspect_seconds:
                self._journal.event(
                    "lost", f"{session.info.actor_id} does not know its lease {lease.lease_id}"
                )
                self._take_overs.give_back(lease)
                self.board.end_lease(lease, LeaseOutcome.EXPIRED, message="lost on the way to the actor")

    def keep_pieces(self, session_id: str, pieces: Sequence[Piece], now: float) -> list[int | None]:
        """Of each piece's lease: the tokens that are held of it; None if no more are wanted."""
        self.fleet.require(session_id, now)
        held: list[int | None] = []
        for piece in pieces:
            lease = self.leases.get(piece.lease_id)
            is_own = lease is not None and lease.session_id == session_id
            held.append(self.board.streams.keep(piece) if is_own else None)
        return held

    def leave(self, session_id: str, reason: str, now: float) -> None:
        session = self.fleet.require(session_id, now)
        self._end_session(session, LeaseOutcome.DRAINED, reason or "left")
        self._journal.event("left", f"{session.info.actor_id}: {reason or 'no reason given'}")

    def tick(self, now: float) -> None:
        """Ends what is past its deadline. Call about once a second.

        If the learner itself stood still, everybody's deadlines move by that gap.
        """
        if self._ticked_at is not None and now - self._ticked_at > _TICK_GAP_SECONDS:
            gap = now - self._ticked_at
            self.leases.shift(gap)
            self.evaluations.shift(gap)
            self.fleet.shift(gap, now)
            self._journal.event(
                "stall", f"the coordinator stood still for {gap:.1f} s; deadlines moved by as much"
            )
        self._ticked_at = now
        for session in self.fleet.silent(now):
            self._journal.event(
                "dead", f"{session.info.actor_id}: no heartbeat for {now - session.heard_at:.0f} s"
            )
            self._end_session(session, LeaseOutcome.DEAD, "no heartbeat")
        for lease in self.leases.expired(now):
            self._journal.event(
                "expired", f"lease {lease.lease_id}: no progress for {now - lease.progress_at:.0f} s"
            )
            self._take_overs.keep_streamed([lease], f"lease {lease.lease_id}")
            self.board.end_lease(lease, LeaseOutcome.EXPIRED, revoke="no progress")
            self.outages.expired(lease, now)
        self.outages.tick(now)
        self._stragglers.tick(self.lineage.waiting, now)
        self.evaluations.tick(now)

    def set_no_room(self, reason: str) -> None:
        """While there is a reason no lease is granted; what is leased goes on."""
        self.no_room = reason

    def note_event(self, kind: str, message: str) -> None:
        self._journal.event(kind, message)

    def set_paused(self, paused: bool) -> None:
        """While paused no lease is granted; what is leased goes on. A restart changes nothing."""
        self.paused = paused
        self._journal.record(PauseSet(paused=paused))
        self._journal.event("paused" if paused else "resumed", "by an operator")

    # -- leases -----------------------------------------------------------------------

    def acquire(
        self, session_id: str, installed: PolicyVersion, digest: str, max_leases: int, now: float
    ) -> tuple[list[Lease], str]:
        """Grants up to `max_leases`; if none, says why. Raises SessionFenced, PeerLost."""
        session = self.fleet.require(session_id, now)
        refusal = self._refusal(session, installed, digest)
        if refusal is not None:
            session.num_asked, session.refusal = 0, refusal
            return [], refusal
        assert self.version is not None
        leases = self.evaluations.grant(session, installed, max_leases, now)
        if len(leases) < max_leases:
            room = max_leases - len(leases)
            more, session.refusal = self.grants.grant(session, self.version, installed, room, now)
            leases += more
        if len(leases) < max_leases:
            # What it cannot be trained with now.
            room = max_leases - len(leases)
            leases += self.evaluations.grant(session, installed, room, now, beyond_share=True)
        if leases:
            session.num_asked, session.refusal = 0, ""
        return leases, session.refusal

    def asks_no_more(self, session_id: str) -> None:
        """An actor that was told to wait for leases has gone away, or waits no longer."""
        session = self.fleet.find(session_id)
        if session is not None:
            session.num_asked = 0

    def _refusal(self, session: Session, installed: PolicyVersion, digest: str) -> str | None:
        if self.finished:
            return "the run is finished"
        if self.version is None:
            return "no version is published yet"
        if self.paused:
            return "the run is paused by an operator"
        if self.no_room:
            return self.no_room
        if session.draining:
            return "the actor is draining"
        if installed.epoch != self.epoch:
            return f"installed is {installed}; versions of epoch {self.epoch} are wanted"
        if self.lineage.versions.get(installed) != digest:
            return f"installed is {installed} with digest {digest[:12]!r}, which was never published"
        session.installed = installed
        return None

    # -- ending things ----------------------------------------------------------------------

    def _end_session(self, session: Session, outcome: LeaseOutcome, reason: str) -> None:
        leases = self.leases.of_session(session.session_id)
        self._take_overs.keep_streamed(leases, session.info.actor_id)
        for lease in leases:
            group = self.groups.get(lease.group_id)
            if group is not None and outcome is LeaseOutcome.DEAD:
                group.deaths.add(session.session_id)
            self._take_overs.give_back(lease)
            self.board.end_lease(lease, outcome, message=reason)
        self.evaluations.session_ended(session.session_id, outcome, reason)
        self.fleet.remove(session.session_id)
        self._journal.record(SessionClosed(session_id=session.session_id, reason=reason))
