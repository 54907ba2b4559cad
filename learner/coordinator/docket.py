"""Decides on what actors submit: trajectories, and leases that they give back. Pure, as the scheduler is.

    item -> next of its session? -> known id? -> flaws, versions, task -> verdict -> slot, lease, records

Every item gets a verdict and a record, or was decided upon before.
"""

from __future__ import annotations

from learner.coordinator import validation
from learner.coordinator.board import Board
from learner.coordinator.decisions import DUPLICATE, PENDING, History, Verdict
from learner.coordinator.demand import Demand
from learner.coordinator.evaluation.evaluation import is_evaluation_lease
from learner.coordinator.evaluation.evaluations import Evaluations
from learner.coordinator.fleet import Fleet, Session
from learner.coordinator.groups import Filled, Group, LeaseOutcome
from learner.coordinator.journal import Journal
from learner.coordinator.known_ids import KnownIds
from learner.coordinator.leases import LiveLease, parse_lease_name
from learner.coordinator.lineage import Lineage
from learner.coordinator.outages import Outages
from learner.coordinator.partials import SentPartial
from learner.coordinator.records import ItemsRefused, SequenceAdvanced, TrajectoryState, TrajectoryStored
from learner.coordinator.stragglers import Stragglers
from learner.coordinator.submissions import Submission
from learner.coordinator.take_overs import TakeOvers
from learner.coordinator.validation import Rejected, RejectionCode
from penstock.errors import FaultKind, SequenceGap
from penstock.trajectory import PolicyVersion

_FAULTS = {
    LeaseOutcome.INFRASTRUCTURE: FaultKind.INFRASTRUCTURE,
    LeaseOutcome.DATA: FaultKind.DATA,
    LeaseOutcome.ENGINE: None,
}
"""Outcomes that are a fault, and of which kind the environment's is."""


class Docket:
    """The items of all sessions, one after the other."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        board: Board,
        lineage: Lineage,
        evaluations: Evaluations,
        outages: Outages,
        stragglers: Stragglers,
        demand: Demand,
        take_overs: TakeOvers,
        journal: Journal,
        history: History,
        max_tokens: int,
    ) -> None:
        """max_tokens: that an episode of training may sample."""
        self.num_filled = 0
        """Slots, since this process started."""
        self._fleet = fleet
        self._board = board
        self._lineage = lineage
        self._evaluations = evaluations
        self._outages = outages
        self._stragglers = stragglers
        self._demand = demand
        self._take_overs = take_overs
        self._journal = journal
        self._history = history
        self._max_tokens = max_tokens
        self._known = KnownIds()

    def restore(self) -> None:
        """Goes on from a ledger."""
        self._known.update(self._history.trajectory_ids())

    def submit(
        self, session_id: str, sequence: int, submission: Submission | Rejected, now: float
    ) -> Verdict:
        """Decides on one trajectory. Raises SessionFenced, PeerLost, SequenceGap."""
        session = self._fleet.require(session_id, now)
        if not _is_next(session, sequence):
            self._journal.record(ItemsRefused(duplicates=1))
            return DUPLICATE
        if isinstance(submission, Rejected):
            return self._refuse(session, submission, submission.lease_id, now)
        try:
            if is_evaluation_lease(submission.lease_id):
                return self._decide_answer(session, sequence, submission, now)
            return self._decide(session, submission, now)
        except Rejected as rejected:
            return self._refuse(session, rejected, submission.lease_id, now)

    def reject(
        self, session_id: str, sequence: int, code: RejectionCode, message: str, now: float
    ) -> Verdict:
        """An item that holds nothing to decide upon."""
        session = self._fleet.require(session_id, now)
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
        session = self._fleet.require(session_id, now)
        if not _is_next(session, sequence):
            return
        self._advance(session)
        if is_evaluation_lease(lease_id):
            self._evaluations.release(session, lease_id, outcome, message, now)
            return
        lease = self._board.leases.get(lease_id)
        if lease is not None and lease.session_id == session_id:
            if partial is not None and outcome is LeaseOutcome.DRAINED:
                self._take_overs.take_over(lease, partial)
            elif outcome in (LeaseOutcome.DRAINED, LeaseOutcome.ENGINE):
                self._take_overs.keep_streamed([lease], f"lease {lease.lease_id}")
            if outcome is LeaseOutcome.DRAINED:
                self._take_overs.give_back(lease)
            self._board.end_lease(lease, outcome, message=message)
            if outcome in _FAULTS:
                self._note_end(lease, now, filled=False)
                self._count_fault(session, lease, outcome, message, now)

    def _refuse(self, session: Session, rejected: Rejected, lease_id: str, now: float) -> Verdict:
        """Ends the lease too, for its actor has nothing else to send under it, unless bytes changed on the way."""
        self._advance(session)
        self._journal.record(ItemsRefused(rejected=(rejected.code,)))
        self._journal.event(
            "rejected", f"{session.info.actor_id}, lease {lease_id[:40]}: {rejected.code}: {rejected}"
        )
        if rejected.code is not RejectionCode.CORRUPT:
            self._end_refused(session, lease_id, f"rejected: {rejected.code}", now)
        return Verdict(None, rejected.code, str(rejected))

    def _end_refused(self, session: Session, lease_id: str, message: str, now: float) -> None:
        if is_evaluation_lease(lease_id):
            self._evaluations.release(session, lease_id, LeaseOutcome.ENGINE, message, now)
            return
        lease = self._board.leases.get(lease_id)
        if lease is not None and lease.session_id == session.session_id:
            self._board.end_lease(lease, LeaseOutcome.ENGINE, message=message)
            self._note_end(lease, now, filled=False)

    def _decide_answer(self, session: Session, sequence: int, submission: Submission, now: float) -> Verdict:
        """Of an evaluation."""
        if submission.trajectory_id in self._known:
            self._advance(session)
            self._journal.record(ItemsRefused(duplicates=1))
            return DUPLICATE
        verdict = self._evaluations.submit(session, sequence, submission, now)
        self._advance(session)
        self._known.add(submission.trajectory_id)
        return verdict

    def _decide(self, session: Session, submission: Submission, now: float) -> Verdict:
        live = self._board.leases.get(submission.lease_id)
        lease = self._lease_of(submission.lease_id) if live is None else live.place
        group = self._board.find(lease[0])
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
        validation.check_versions(submission.versions, self._lineage.versions)
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
            group = self._board.find(group_id)
            if group is None:
                if self._history.was_granted(group_id, slot, attempt):
                    return named
            elif slot < len(group.slots) and attempt < group.slots[slot].next_attempt:
                return named
        raise Rejected(RejectionCode.UNKNOWN_LEASE, f"lease {lease_id[:40]!r} was never granted in this run")

    def _verdict_on(self, group: Group | None, slot_number: int, oldest: PolicyVersion) -> Verdict:
        if group is not None and group.is_quarantined:
            return Verdict(TrajectoryState.QUARANTINED, message="its group is quarantined")
        if group is None or group.group_id not in self._board.groups or self._board.is_assigned(group):
            return Verdict(TrajectoryState.SURPLUS, message="its group is trained or dropped")
        if group.slots[slot_number].filled is not None:
            return Verdict(TrajectoryState.SURPLUS, message="its slot was filled by another")
        if oldest.epoch == self._lineage.epoch and oldest.step < group.born.step:
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
            self._outages.filled(environment, lease_id, now)
            slot.filled = filled
        if own is not None:
            self._note_end(own, now, filled=verdict is PENDING)
            self._stragglers.finished(own, environment, filled.num_sampled, now)
            self._board.end_lease(own, LeaseOutcome.FILLED)
        if slot.filled is not None and slot.lease_ids:
            self._board.revoke_leases(slot, "another result came first")
        if own is None:
            self._board.end_if_useless(group)

    def _note_end(self, lease: LiveLease, now: float, *, filled: bool) -> None:
        if not lease.adopted:
            self._demand.lease_ended(now - lease.granted_at, filled=filled)

    def _advance(self, session: Session) -> None:
        """Journals the number of an item that leaves no trajectory; a stored one has its number with it."""
        self._journal.record(SequenceAdvanced(session.session_id, session.last_sequence))

    def _count_fault(
        self, session: Session, lease: LiveLease, outcome: LeaseOutcome, message: str, now: float
    ) -> None:
        group = self._board.find(lease.group_id)
        kind = _FAULTS[outcome]
        if kind is None or group is None:
            self._journal.event("fault", f"{session.info.actor_id}, lease {lease.lease_id}: {message[:500]}")
        else:
            self._outages.fault(group.task.environment, lease.lease_id, kind, message, now)


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
