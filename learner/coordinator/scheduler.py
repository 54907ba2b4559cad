"""The actors' side of a run: sessions, leases, submissions. Pure: no sockets, no disk, no clock.

Methods take the clock's reading and change the state at once; what happened waits in
`take_records` for the ledger, and what actors must be told in `take_revocations`. The
service writes the records before it answers anybody. The trainer's side is `lineage`, and
both work on one `board` of open groups.

Data flow of one trajectory:

    acquire -> lease -> submit -> slot filled -> group ready -> lineage.next_batch -> published
      ^                                                                                  |
      +------------------ admission: the new version makes room for new groups ----------+
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from learner.config import BreakerConfig, FleetConfig, ScheduleConfig
from learner.coordinator import partials, validation
from learner.coordinator.admission import Admission
from learner.coordinator.board import Board
from learner.coordinator.decisions import (
    DUPLICATE,
    PENDING,
    History,
    Revocation,
    Verdict,
)
from learner.coordinator.demand import Demand
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.coordinator.evaluation.evaluation import is_evaluation_lease
from learner.coordinator.evaluation.evaluations import Evaluations
from learner.coordinator.evaluation.plan import Plan
from learner.coordinator.fleet import ActorInfo, EnvironmentUse, Fleet, ReportedStats, Session, WeightsUse
from learner.coordinator.grants import Grants
from learner.coordinator.groups import Filled, Group, HandedOver, LeaseOutcome
from learner.coordinator.journal import Journal
from learner.coordinator.known_ids import KnownIds
from learner.coordinator.leases import LeaseTable, LiveLease, RolloutReport, parse_lease_name
from learner.coordinator.lineage import Lineage
from learner.coordinator.outages import Outages
from learner.coordinator.partials import SentPartial
from learner.coordinator.records import (
    ItemsRefused,
    PartialStored,
    Record,
    SequenceAdvanced,
    SessionClosed,
    SessionOpened,
    TrajectoryState,
    TrajectoryStored,
)
from learner.coordinator.sieve import Sieve
from learner.coordinator.stragglers import Stragglers
from learner.coordinator.streams import Piece, Streams
from learner.coordinator.submissions import Submission
from learner.coordinator.tasks import TaskOrder
from learner.coordinator.validation import Limits, Rejected, RejectionCode
from penstock.errors import FaultKind, SequenceGap
from penstock.trajectory import Lease, PolicyVersion, Sampling
from penstock.waits import WaitSummary

_TICK_GAP_SECONDS = 2.0
_FAULTS = {
    LeaseOutcome.INFRASTRUCTURE: FaultKind.INFRASTRUCTURE,
    LeaseOutcome.DATA: FaultKind.DATA,
    LeaseOutcome.ENGINE: None,
}
"""Outcomes that are a fault, and of which kind the environment's is."""


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
        self.num_filled = 0
        """Slots, since this process started."""
        self._config = fleet
        self._history = history
        self._known = KnownIds()
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
        self._max_tokens = sampling.max_tokens
        self._num_sessions = 0
        self._ticked_at: float | None = None
        self._stragglers = Stragglers(fleet=fleet, board=self.board, journal=self._journal)
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
        now: float,
    ) -> None:
        """Goes on from a ledger. Leases wait for their actors to join again and name them."""
        self._num_sessions, self.grants.next_group_id = num_sessions, next_group_id
        self._known.update(self._history.trajectory_ids())
        self.board.hold(open_groups)
        self.lineage.restore(epoch=epoch, from_step=from_step, versions=versions, assigned=assigned)
        for group_id, slot, attempt in live_leases:
            held = self.groups[group_id].slots[slot]
            if held.filled is not None:
                continue
            lease = self.leases.grant(group_id=group_id, slot=slot, attempt=attempt, session_id="", now=now)
            held.lease_ids.append(lease.lease_id)
            lease.deadline = now + self._config.dead_seconds

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
            self._keep_streamed([lease], f"lease {lease.lease_id}")
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
        """While paused no lease is granted; what is leased goes on."""
        self.paused = paused
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

    # -- submissions ----------------------------------------------------------------------

    def submit(
        self, session_id: str, sequence: int, submission: Submission | Rejected, now: float
    ) -> Verdict:
        """Decides on one trajectory. Raises SessionFenced, PeerLost, SequenceGap."""
        session = self.fleet.require(session_id, now)
        if not _is_next(session, sequence):
            self._journal.record(ItemsRefused(duplicates=1))
            return DUPLICATE
        if isinstance(submission, Rejected):
            return self._refuse(session, submission, submission.lease_id)
        try:
            if is_evaluation_lease(submission.lease_id):
                return self._decide_answer(session, sequence, submission, now)
            return self._decide(session, submission, now)
        except Rejected as rejected:
            return self._refuse(session, rejected, submission.lease_id)

    def _refuse(self, session: Session, rejected: Rejected, lease_id: str) -> Verdict:
        self._advance(session)
        self._journal.record(ItemsRefused(rejected=(rejected.code,)))
        self._journal.event(
            "rejected", f"{session.info.actor_id}, lease {lease_id[:40]}: {rejected.code}: {rejected}"
        )
        return Verdict(None, rejected.code, str(rejected))

    def _decide_answer(self, session: Session, sequence: int, submission: Submission, now: float) -> Verdict:
        """Of an evaluation."""
        if submission.trajectory_id in self._known:
            self._advance(session)
            self._journal.record(ItemsRefused(duplicates=1))
            return DUPLICATE
        verdict = self.evaluations.submit(session, sequence, submission, now)
        self._advance(session)
        self._known.add(submission.trajectory_id)
        return verdict

    def reject(
        self, session_id: str, sequence: int, code: RejectionCode, message: str, now: float
    ) -> Verdict:
        """An item that holds nothing to decide upon."""
        session = self.fleet.require(session_id, now)
        if _is_next(session, sequence):
            self._advance(session)
            self._journal.record(ItemsRefused(rejected=(code,)))
        return Verdict(None, code, message)

    def release(
        self,
        session_id: str,
        sequence: int,
        lease_id: str,
        outcome: LeaseOutcome,
        message: str,
        now: float,
        partial: SentPartial | None = None,
    ) -> None:
        """An actor gives a lease back without a trajectory, perhaps with what it played of one."""
        session = self.fleet.require(session_id, now)
        if not _is_next(session, sequence):
            return
        self._advance(session)
        if is_evaluation_lease(lease_id):
            self.evaluations.release(session, lease_id, outcome, message, now)
            return
        lease = self.leases.get(lease_id)
        if lease is not None and lease.session_id == session_id:
            if partial is not None and outcome is LeaseOutcome.DRAINED:
                self._take_over(lease, partial)
            elif outcome in (LeaseOutcome.DRAINED, LeaseOutcome.ENGINE):
                self._keep_streamed([lease], f"lease {lease.lease_id}")
            self.board.end_lease(lease, outcome, message=message)
            if outcome in _FAULTS:
                self.demand.lease_ended(now - lease.granted_at, filled=False)
                self._count_fault(session, lease, outcome, message, now)

    def _keep_streamed(self, leases: Sequence[LiveLease], whose: str) -> None:
        """Keeps what was told of rollouts that come to nothing: the slots' next leases go on from it."""
        num_kept = num_tokens = num_told = 0
        for lease in leases:
            streamed = self.board.streams.take(lease.lease_id)
            kept = None if streamed is None else self._take_over(lease, streamed)
            if kept is not None:
                num_kept, num_tokens = num_kept + 1, num_tokens + kept.num_tokens
                num_told += lease.num_tokens
        if num_kept:
            self._journal.event(
                "kept",
                f"{num_kept} rollouts of {whose}, with {num_tokens} of the {num_told} tokens that it told of",
            )

    def _take_over(self, lease: LiveLease, partial: SentPartial) -> HandedOver | None:
        """Keeps what was played elsewhere, unless its group is closed or it is unsound."""
        group = self.groups.get(lease.group_id)
        if group is None or group.slots[lease.slot].filled is not None:
            return None
        try:
            kept = partials.check(partial, self.limits, self.lineage.versions, group, self.epoch)
        except Rejected as rejected:
            self._journal.record(ItemsRefused(rejected=(rejected.code,)))
            self._journal.event("rejected", f"partial rollout of lease {lease.lease_id}: {rejected}")
            return None
        group.slots[lease.slot].handed_over = kept
        self._journal.record(
            PartialStored(
                group_id=lease.group_id,
                slot=lease.slot,
                payload=partial.payload,
                checksum=partial.checksum,
                newest=kept.newest,
                num_tokens=kept.num_tokens,
            )
        )
        return kept

    def _advance(self, session: Session) -> None:
        """Journals the number of an item that leaves no trajectory; a stored one has its number with it."""
        self._journal.record(SequenceAdvanced(session.session_id, session.last_sequence))

    def _decide(self, session: Session, submission: Submission, now: float) -> Verdict:
        live = self.leases.get(submission.lease_id)
        lease = self._lease_of(submission.lease_id) if live is None else live.place
        group = self.board.find(lease[0])
        if submission.trajectory_id in self._known:
            self._advance(session)
            self._journal.record(ItemsRefused(duplicates=1))
            return DUPLICATE
        if submission.flaw is not None:
            raise submission.flaw
        if submission.num_sampled > self._max_tokens:
            raise Rejected(
                RejectionCode.TOO_LONG,
                f"{submission.num_sampled} sampled tokens; at most {self._max_tokens} are allowed",
            )
        validation.check_versions(submission.versions, self.lineage.versions)
        if group is not None:
            validation.check_task(submission.task, group.task)
            validation.check_observation(submission.observation_digest, group.observation_digest)
        oldest = submission.oldest
        verdict = self._verdict_on(group, lease[1], oldest)
        filled = Filled(
            submission.trajectory_id,
            oldest.step,
            submission.num_sampled,
            submission.is_mixed,
            submission.reward,
            submission.observation_digest,
        )
        self._store(session, submission, lease, filled, verdict)
        if group is not None:
            self._settle(group, lease[1], live, submission.lease_id, filled, verdict, now)
        return verdict

    def _lease_of(self, lease_id: str) -> tuple[int, int, int]:
        """(group_id, slot, attempt) of a lease that was granted and lives no more. Raises Rejected."""
        named = parse_lease_name(lease_id)
        if named is not None:
            group_id, slot, attempt = named
            group = self.board.find(group_id)
            if group is None:
                if self._history.was_granted(group_id, slot, attempt):
                    return named
            elif slot < len(group.slots) and attempt < group.slots[slot].next_attempt:
                return named
        raise Rejected(RejectionCode.UNKNOWN_LEASE, f"lease {lease_id[:40]!r} was never granted in this run")

    def _verdict_on(self, group: Group | None, slot_number: int, oldest: PolicyVersion) -> Verdict:
        if group is not None and group.is_quarantined:
            return Verdict(TrajectoryState.QUARANTINED, message="its group is quarantined")
        if group is None or group.group_id not in self.groups or self.board.is_assigned(group):
            return Verdict(TrajectoryState.SURPLUS, message="its group is trained or dropped")
        if group.slots[slot_number].filled is not None:
            return Verdict(TrajectoryState.SURPLUS, message="its slot was filled by another")
        if oldest.epoch == self.epoch and oldest.step < group.born.step:
            return Verdict(
                TrajectoryState.STALE, message=f"version {oldest} is older than the group's {group.born}"
            )
        return PENDING

    def _store(
        self,
        session: Session,
        submission: Submission,
        lease: tuple[int, int, int],
        filled: Filled,
        verdict: Verdict,
    ) -> None:
        """lease: (group_id, slot, attempt)."""
        assert verdict.state is not None
        self._known.add(submission.trajectory_id)
        self._journal.record(
            # By place, not by name: of these there is one for each trajectory, and names cost 1 us.
            TrajectoryStored(
                filled.trajectory_id,
                *lease,
                session.session_id,
                session.last_sequence,
                verdict.state,
                submission.task.environment,
                filled.oldest_step,
                filled.num_sampled,
                filled.mixed,
                filled.reward,
                filled.observation_digest,
                submission.payload if verdict is PENDING else None,
                submission.checksum,
            )
        )

    def _settle(
        self,
        group: Group,
        slot_number: int,
        own: LiveLease | None,
        lease_id: str,
        filled: Filled,
        verdict: Verdict,
        now: float,
    ) -> None:
        """Fills the slot, or frees it, and ends the leases that this makes needless.

        own: the lease that it came under, if that still lives.
        """
        slot = group.slots[slot_number]
        environment = group.task.environment
        if verdict is PENDING:
            slot.given_up = False
            self.num_filled += 1
            self.outages.filled(environment, lease_id, now)
            slot.filled = filled
        if own is not None:
            self.demand.lease_ended(now - own.granted_at, filled=verdict is PENDING)
            self._stragglers.finished(own, environment, filled.num_sampled, now)
            self.board.end_lease(own, LeaseOutcome.FILLED)
        if slot.filled is not None and slot.lease_ids:
            self.board.revoke_leases(slot, "another result came first")
        if own is None:
            self.board.end_if_useless(group)

    # -- ending things ----------------------------------------------------------------------

    def _end_session(self, session: Session, outcome: LeaseOutcome, reason: str) -> None:
        leases = self.leases.of_session(session.session_id)
        self._keep_streamed(leases, session.info.actor_id)
        for lease in leases:
            group = self.groups.get(lease.group_id)
            if group is not None:
                slot = group.slots[lease.slot]
                # No fault: what it went on from may be gone on from again.
                slot.handed_over = slot.handed_over or lease.continues
                if outcome is LeaseOutcome.DEAD:
                    group.deaths.add(session.session_id)
            self.board.end_lease(lease, outcome, message=reason)
        self.evaluations.session_ended(session.session_id, outcome, reason)
        self.fleet.remove(session.session_id)
        self._journal.record(SessionClosed(session_id=session.session_id, reason=reason))

    def _count_fault(
        self, session: Session, lease: LiveLease, outcome: LeaseOutcome, message: str, now: float
    ) -> None:
        group = self.board.find(lease.group_id)
        kind = _FAULTS[outcome]
        if kind is None or group is None:
            self._journal.event("fault", f"{session.info.actor_id}, lease {lease.lease_id}: {message[:500]}")
        else:
            self.outages.fault(group.task.environment, lease.lease_id, kind, message, now)


def _is_next(session: Session, sequence: int) -> bool:
    """Notes an item's number; False if it was decided upon before. Raises SequenceGap."""
    if sequence <= session.last_sequence:
        return False
    if sequence != session.last_sequence + 1:
        raise SequenceGap(
            f"item {sequence} follows {session.last_sequence}; send again from {session.last_sequence + 1}"
        )
    session.last_sequence = sequence
    return True
