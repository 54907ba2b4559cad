"""The run's evaluations: when one opens, who works on it, how it ends. Pure.

    published(v) -> open, if v is due -> leases, to actors that hold v -> answers -> result
                                             ^                     |
                                             +---- death, fault ---+

One evaluation is open at a time, of one version, and every token of it is of that version.
It rides in the fleet that trains: its actors hold the version while all others go on, and
what they do not need for it they train with. Its answers never train.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice

from learner.config import FleetConfig
from learner.coordinator.decisions import PENDING, Revocation, Verdict
from learner.coordinator.evaluation import answers
from learner.coordinator.evaluation.assignments import Assignments
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.coordinator.evaluation.evaluation import Evaluation, parse_evaluation_lease
from learner.coordinator.evaluation.history import RecoveredEvaluations
from learner.coordinator.evaluation.holders import Holders
from learner.coordinator.evaluation.plan import Plan
from learner.coordinator.evaluation.records import (
    AnswerState,
    EvaluationEnded,
    EvaluationOpened,
    EvaluationState,
)
from learner.coordinator.evaluation.result import EvaluationResult
from learner.coordinator.fleet import Fleet, Session
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.journal import Journal
from learner.coordinator.leases import LeaseTable, RolloutReport
from learner.coordinator.records import TrajectoryState
from learner.coordinator.submissions import Submission
from learner.coordinator.validation import Rejected, RejectionCode
from penstock.trajectory import Lease, PolicyVersion

SURPLUS = Verdict(
    TrajectoryState.SURPLUS, message="its question was answered before, or its evaluation is over"
)


class Evaluations:
    """At most one that is open, and the results of those before it."""

    def __init__(
        self,
        *,
        config: EvaluationConfig,
        plan: Plan,
        num_steps: int,
        fleet_config: FleetConfig,
        fleet: Fleet,
        journal: Journal,
        left_out: Callable[[], Sequence[str]] = tuple,
        was_granted: Callable[[int, int, int], bool] = lambda number, slot, attempt: False,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """left_out: environments that may not be leased now. was_granted: whether the ledger has such a lease."""
        self.open: Evaluation | None = None
        self.newest: EvaluationResult | None = None
        self.num_answered = 0
        """Since this process started."""
        self.is_held: Callable[[PolicyVersion], bool] = lambda version: True
        """Whether actors can fetch a version."""
        self.holders = Holders(config.fleet_share)
        self._config = config
        self._plan = plan
        self._num_steps = num_steps
        self._fleet_config = fleet_config
        self._fleet = fleet
        self._journal = journal
        self._left_out = left_out
        self._was_granted = was_granted
        self._wall_clock = wall_clock
        self._next_number = 1
        self._version: tuple[PolicyVersion, str] | None = None
        self._owed = False
        self._measured: set[str] = set()
        self._ended: list[EvaluationResult] = []
        self._assignments = Assignments(config=fleet_config, journal=journal)
        self._is_manned = False
        """An actor has joined since this process started: before that no deadline draws near."""
        self._patient_until = 0.0
        """After a restart, when actors that have the version may not have joined again yet."""

    # -- opening and ending ---------------------------------------------------------------

    def restore(self, found: RecoveredEvaluations, now: float) -> None:
        """Goes on from a ledger."""
        plan = self._plan.describe()
        self._patient_until = now + self._fleet_config.dead_seconds
        self._next_number, self._owed = found.next_number, found.owed
        self._measured = {digest for digest, asked in found.measured if asked == plan}
        if found.results:
            self.newest = EvaluationResult.from_json(found.results[-1])
        if found.open is None:
            return
        self.open = self._make(found.open.number, found.open.version, found.open.digest, now)
        if found.open.plan != plan or not self._config.every_steps:
            self._void("the settings of evaluations changed")
            return
        self.open.restore(found.open, self._fleet_config)
        self._event(f"goes on with {self.open.num_answers} of {self.open.num_slots} answers")

    def resume(self, version: PolicyVersion, digest: str, now: float) -> None:
        """The coordinator was started again, and the trainer of its newest version lives."""
        self._version = (version, digest)
        self._open_next(now)

    def lineage_opened(self) -> None:
        """A trainer starts from a checkpoint: versions before it are gone."""
        self._version = None
        if self.open is not None:
            self._void("a trainer started anew: the evaluation begins again with its first version")

    def published(self, version: PolicyVersion, digest: str, now: float) -> None:
        """Opens an evaluation of a version that is due, unless one is open."""
        self._version = (version, digest)
        if self.open is None:
            if self._is_due(version.step) or self._owed:
                self._open_next(now, owed=True)
        elif self._is_due(version.step):
            self._journal.event(
                "evaluation",
                f"version {version} is due while that of {self.open.version} is open: it waits for its end",
            )

    def tick(self, now: float) -> None:
        """Ends what is past its deadline, and sees to it that somebody works on the rest."""
        evaluation = self.open
        if evaluation is None:
            return
        self._assignments.expire(evaluation, now)
        if self._version is None:
            return
        self._is_manned = self._is_manned or len(self._fleet) > 0
        if not self._is_manned:
            seconds = self._config.deadline_seconds
            evaluation.deadline = min(now, evaluation.opened_at + seconds) + seconds
        if evaluation.is_settled:
            self._finish(EvaluationState.COMPLETE, now)
        elif now >= evaluation.deadline:
            self._finish(EvaluationState.DEADLINE, now)
        elif not self._man(evaluation, now):
            reason = f"no actor has version {evaluation.version}, and it cannot be fetched any more"
            self._void(f"{reason}: the evaluation begins again with a newer one")
            self._open_next(now)

    def shift(self, seconds: float) -> None:
        """Moves every deadline, after a pause of the learner itself."""
        self.leases.shift(seconds)
        if self.open is not None:
            self.open.deadline += seconds

    def take_ended(self) -> list[EvaluationResult]:
        """Results that nobody has written down yet."""
        ended, self._ended = self._ended, []
        return ended

    def seconds_left(self, now: float) -> float:
        return 0.0 if self.open is None else max(self.open.deadline - now, 0.0)

    def held_by(self, session_id: str) -> PolicyVersion | None:
        """The version that a session's actor is to hold."""
        return self.open.version if self.open is not None and session_id in self.holders else None

    def _is_due(self, step: int) -> bool:
        every = self._config.every_steps
        return bool(every) and (step % every == 0 or step == self._num_steps)

    def _was_due_since(self, step: int, newest: int) -> bool:
        return any(self._is_due(later) for later in range(step + 1, newest + 1))

    def _open_next(self, now: float, *, owed: bool = False) -> None:
        """Opens one of the newest version, if one is owed and that has no result yet."""
        if self._version is None or self.open is not None or not (owed or self._owed):
            return
        version, digest = self._version
        self._owed = False
        if digest in self._measured:
            return
        self.open = self._make(self._next_number, version, digest, now)
        self._next_number += 1
        self._journal.record(
            EvaluationOpened(
                number=self.open.number,
                version=version,
                digest=digest,
                num_slots=self.open.num_slots,
                plan=self._plan.describe(),
                time=self._wall_clock(),
            )
        )
        self._event(f"opens, with {self.open.num_slots} questions")
        self._man(self.open, now)

    def _make(self, number: int, version: PolicyVersion, digest: str, now: float) -> Evaluation:
        deadline = now + self._config.deadline_seconds
        return Evaluation(
            number=number, version=version, digest=digest, plan=self._plan, now=now, deadline=deadline
        )

    def _finish(self, state: EvaluationState, now: float) -> None:
        evaluation = self.open
        assert evaluation is not None
        faults = evaluation.faults()
        result = EvaluationResult(
            number=evaluation.number,
            version=evaluation.version,
            digest=evaluation.digest,
            state=state,
            num_slots=evaluation.num_slots,
            num_answers=evaluation.num_answers,
            num_missing=sum(not slot.is_settled for slot in evaluation.slots),
            faults=faults,
            seconds=round(now - evaluation.opened_at, 3),
            time=self._wall_clock(),
            scores=evaluation.scores(self._config.pass_at, self._config.pass_threshold),
        )
        self.newest = result
        self._ended.append(result)
        self._measured.add(evaluation.digest)
        self._close(state, "", result)
        self._journal.event("evaluated", f"{result.describe()} ({state}, {result.seconds:.1f} s)")
        if self._version is not None and self._was_due_since(evaluation.version.step, self._version[0].step):
            self._open_next(now, owed=True)

    def _void(self, reason: str) -> None:
        self._event(f"is void: {reason}")
        self._close(EvaluationState.VOID, reason, None)
        self._owed = bool(self._config.every_steps)

    def _close(self, state: EvaluationState, reason: str, result: EvaluationResult | None) -> None:
        assert self.open is not None
        self._assignments.end_all(self.open, "its evaluation is over")
        self._journal.record(
            EvaluationEnded(
                number=self.open.number,
                state=state,
                reason=reason,
                result=None if result is None else result.to_json(),
            )
        )
        self.open = None
        self.holders.clear()

    def _man(self, evaluation: Evaluation, now: float) -> bool:
        """Chooses who holds the version; False if nobody will ever have it."""
        assert self._version is not None
        sessions = self._fleet.sessions()
        is_newest = evaluation.version == self._version[0]
        is_held = is_newest or self.is_held(evaluation.version)
        num_free = sum(1 for _ in evaluation.free_slots(self._left_out()))
        change = self.holders.choose(
            evaluation, sessions, self._assignments.count, num_free=num_free, is_held=is_held, now=now
        )
        told = ((change.chosen, "holds it"), (change.let_go, "goes on"), (change.late, "did not come to it"))
        for names, what in told:
            if names:
                self._event(f"{', '.join(names)} {what}")
        if is_newest or len(self.holders) or not num_free or not sessions or now < self._patient_until:
            return True
        return is_held and not self.holders.is_hopeless(sessions)

    def _event(self, what: str) -> None:
        assert self.open is not None
        self._journal.event(
            "evaluation", f"evaluation {self.open.number} of version {self.open.version} {what}"
        )

    # -- actors ---------------------------------------------------------------------------

    @property
    def leases(self) -> LeaseTable:
        return self._assignments.leases

    def take_revocations(self) -> list[Revocation]:
        return self._assignments.take_revocations()

    def grant(
        self,
        session: Session,
        installed: PolicyVersion,
        max_leases: int,
        now: float,
        *,
        beyond_share: bool = False,
    ) -> list[Lease]:
        """Up to `max_leases`, to an actor that asks under the version that is evaluated.

        beyond_share: it could do nothing else.
        """
        evaluation = self.open
        if evaluation is None:
            return []
        if self.holders.asked(session, evaluation, installed, now):
            self._event(f"{session.info.actor_id} did not turn back to it")
        if installed != evaluation.version:
            return []
        sessions = self._fleet.sessions()
        room = max_leases
        if not beyond_share:
            room = min(room, self.holders.num_slots(sessions) - len(self.leases))
        free = list(islice(evaluation.free_slots(self._left_out()), max(room, 0)))
        is_new = session.session_id not in self.holders
        if not free or not self.holders.take(session, installed, sessions, now):
            return []
        if is_new:
            self._event(f"{session.info.actor_id} holds it")
        return [self._assignments.grant(evaluation, slot, session.session_id, now) for slot in free]

    def joined(self, session: Session, now: float) -> None:
        """An actor that joins again may have the version still."""
        if self.open is not None and session.installed == self.open.version:
            self.holders.take(session, self.open.version, self._fleet.sessions(), now)

    def adopt(self, lease_id: str, session: Session, now: float) -> None:
        """An actor that joins again still works on a lease."""
        if self.open is not None:
            self._assignments.adopt(self.open, lease_id, session.session_id, now)

    def heartbeat(self, session: Session, progress: Sequence[RolloutReport], now: float) -> None:
        """progress: of every lease that the actor holds, of evaluations and others."""
        if self.open is not None and len(self.leases):
            self._assignments.heartbeat(self.open, session.session_id, progress, now)

    def release(
        self, session: Session, lease_id: str, outcome: LeaseOutcome, message: str, now: float
    ) -> None:
        """An actor gives a lease back without an answer."""
        lease = self.leases.get(lease_id)
        if self.open is None or lease is None or lease.session_id != session.session_id:
            return
        if outcome not in (LeaseOutcome.DRAINED, LeaseOutcome.REVOKED):
            self._journal.event(
                "fault", f"{session.info.actor_id}, lease {lease_id}: {outcome}: {message[:500]}"
            )
        self._assignments.end(self.open, lease, outcome, message)
        self._finish_if_settled(now)

    def session_ended(self, session_id: str, outcome: LeaseOutcome, reason: str) -> None:
        for lease in self.leases.of_session(session_id):
            assert self.open is not None
            self._assignments.end(self.open, lease, outcome, reason)

    def submit(self, session: Session, sequence: int, submission: Submission, now: float) -> Verdict:
        """Decides on one answer. Raises Rejected."""
        named = parse_evaluation_lease(submission.lease_id)
        if named is None or not self._is_known(*named):
            raise Rejected(
                RejectionCode.UNKNOWN_LEASE,
                f"lease {submission.lease_id[:40]!r} was never granted in this run",
            )
        number, slot, _ = named
        evaluation = self.open if self.open is not None and self.open.number == number else None
        self._check(submission, evaluation, slot)
        counts = evaluation is not None and evaluation.slots[slot].answer is None
        state = AnswerState.COUNTED if counts else AnswerState.SURPLUS
        self._journal.record(answers.record_of(submission, named, session.session_id, sequence, state))
        if evaluation is None or not counts:
            return SURPLUS
        self.num_answered += 1
        evaluation.answer(slot, answers.answer_of(submission), submission.observation_digest)
        self._assignments.answered(evaluation, slot, submission.lease_id)
        self._finish_if_settled(now)
        return PENDING

    def _is_known(self, number: int, slot: int, attempt: int) -> bool:
        if self.open is not None and number == self.open.number:
            return self.open.was_granted(number, slot, attempt)
        return number < self._next_number and self._was_granted(number, slot, attempt)

    def _check(self, submission: Submission, evaluation: Evaluation | None, slot: int) -> None:
        """evaluation: None if it is over. Raises Rejected; its lease then ends like after a fault of the engine."""
        try:
            if submission.flaw is not None:
                raise submission.flaw
            if evaluation is not None:
                answers.check(submission, evaluation, slot)
        except Rejected as rejected:
            lease = self.leases.get(submission.lease_id)
            if lease is not None and evaluation is not None:
                message = f"its answer was rejected: {rejected}"
                self._assignments.end(evaluation, lease, LeaseOutcome.ENGINE, message)
            raise

    def _finish_if_settled(self, now: float) -> None:
        if self.open is not None and self.open.is_settled:
            self._finish(EvaluationState.COMPLETE, now)
