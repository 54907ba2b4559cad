"""Leases on the questions of the evaluation that is open: granted, extended, given back. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from learner.config import FleetConfig
from learner.coordinator.decisions import Revocation
from learner.coordinator.evaluation.evaluation import (
    Evaluation,
    evaluation_lease_name,
    parse_evaluation_lease,
)
from learner.coordinator.evaluation.records import EvaluationLeaseEnded, EvaluationLeaseGranted
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.journal import Journal
from learner.coordinator.leases import LeaseTable, LiveLease, RolloutReport
from penstock.trajectory import Lease, Pin


class Assignments:
    """Live leases; none while no evaluation is open."""

    def __init__(self, *, config: FleetConfig, journal: Journal) -> None:
        self.leases = LeaseTable(progress_timeout=config.progress_timeout_seconds, name=evaluation_lease_name)
        self._config = config
        self._journal = journal
        self._revocations: list[Revocation] = []

    def take_revocations(self) -> list[Revocation]:
        revocations, self._revocations = self._revocations, []
        return revocations

    def count(self, session_id: str) -> int:
        return len(self.leases.of_session(session_id))

    def grant(self, evaluation: Evaluation, number: int, session_id: str, now: float) -> Lease:
        """A free slot's next lease, pinned to the evaluation's version."""
        slot, question = evaluation.slots[number], evaluation.plan.questions[number]
        attempt = slot.next_attempt
        slot.next_attempt += 1
        lease = self.leases.grant(
            group_id=evaluation.number, slot=number, attempt=attempt, session_id=session_id, now=now
        )
        slot.lease_id = lease.lease_id
        self._journal.record(
            EvaluationLeaseGranted(
                number=evaluation.number, slot=number, attempt=attempt, session_id=session_id
            )
        )
        return Lease(
            lease_id=lease.lease_id,
            group_id=evaluation.number,
            slot=number,
            attempt=attempt,
            task=question.task,
            sampling=evaluation.plan.sampling(question),
            progress_timeout_seconds=self._config.progress_timeout_seconds,
            pin=Pin(evaluation.version, max(evaluation.deadline - now, 0.0)),
        )

    def adopt(self, evaluation: Evaluation, lease_id: str, session_id: str, now: float) -> None:
        """An actor that joins again still works on a lease, which this process may never have heard of."""
        named = parse_evaluation_lease(lease_id)
        if self.leases.adopt(lease_id, session_id, now) or named is None:
            return
        number, slot_number, attempt = named
        if not evaluation.was_granted(number, slot_number, attempt):
            return
        slot = evaluation.slots[slot_number]
        if slot.is_free:
            self.leases.grant(
                group_id=number, slot=slot_number, attempt=attempt, session_id=session_id, now=now
            )
            slot.lease_id = lease_id

    def heartbeat(
        self, evaluation: Evaluation, session_id: str, progress: Sequence[RolloutReport], now: float
    ) -> None:
        """progress: of every lease that the actor holds, of evaluations and others."""
        for report in progress:
            self.leases.progress(report, session_id, now)
        named = {report.lease_id for report in progress}
        for lease in self.leases.of_session(session_id):
            if lease.lease_id not in named and now - lease.granted_at > self._config.suspect_seconds:
                self.end(evaluation, lease, LeaseOutcome.EXPIRED, "lost on the way to the actor")

    def end(
        self,
        evaluation: Evaluation,
        lease: LiveLease,
        outcome: LeaseOutcome,
        message: str,
        *,
        revoke: bool = False,
    ) -> None:
        """A lease ends without an answer. revoke: its actor is told."""
        self.leases.end(lease.lease_id)
        self._journal.record(
            EvaluationLeaseEnded(
                number=lease.group_id,
                slot=lease.slot,
                attempt=lease.attempt,
                outcome=outcome,
                message=message[:500],
            )
        )
        if revoke:
            self._revocations.append(Revocation(lease.session_id, lease.lease_id, message))
        slot = evaluation.slots[lease.slot]
        slot.lease_id = ""
        slot.note_end(outcome, message, self._config)

    def end_all(self, evaluation: Evaluation, message: str) -> None:
        for lease in list(self.leases):
            self.end(evaluation, lease, LeaseOutcome.REVOKED, message, revoke=True)

    def expire(self, evaluation: Evaluation, now: float) -> None:
        for lease in self.leases.expired(now):
            self.end(evaluation, lease, LeaseOutcome.EXPIRED, "no progress", revoke=True)

    def answered(self, evaluation: Evaluation, number: int, lease_id: str) -> None:
        """An answer came under a lease: it is over, and so is another that the slot may have."""
        slot = evaluation.slots[number]
        self.leases.end(lease_id)
        other = self.leases.get(slot.lease_id)
        if other is not None:
            self.end(evaluation, other, LeaseOutcome.REVOKED, "another answer came first", revoke=True)
        slot.lease_id = ""
