"""One evaluation: its slots, their leases and answers. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from learner.config import FleetConfig
from learner.coordinator.evaluation.history import RecoveredEvaluation
from learner.coordinator.evaluation.plan import Plan
from learner.coordinator.groups import LeaseOutcome
from penstock.scores import MEAN, Answer, Score, mean_score, score
from penstock.trajectory import PolicyVersion

MOST_DEATHS = 3
"""Of actors that work on one slot, until it is given up."""


def evaluation_lease_name(number: int, slot: int, attempt: int) -> str:
    """What a lease of an evaluation is called on the wire."""
    return f"e{number}.{slot}.{attempt}"


def is_evaluation_lease(lease_id: str) -> bool:
    return lease_id.startswith("e")


def parse_evaluation_lease(lease_id: str) -> tuple[int, int, int] | None:
    """(number, slot, attempt); None if no lease was ever called so."""
    parts = lease_id.removeprefix("e").split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts):
        return None
    number, slot, attempt = map(int, parts)
    return number, slot, attempt


@dataclass(slots=True)
class EvaluationSlot:
    """One question. It is leased until an answer comes or it is given up."""

    next_attempt: int = 0
    lease_id: str = ""
    answer: Answer | None = None
    given_up: str = ""
    """The fault that it was given up after."""
    faults: Counter[LeaseOutcome] = field(default_factory=Counter)

    @property
    def is_settled(self) -> bool:
        return self.answer is not None or bool(self.given_up)

    @property
    def is_free(self) -> bool:
        return not (self.lease_id or self.is_settled)

    def note_end(self, outcome: LeaseOutcome, message: str, fleet: FleetConfig) -> None:
        """A lease came to nothing: gives the slot up once a budget is spent."""
        self.faults[outcome] += 1
        infrastructure = self.faults[LeaseOutcome.INFRASTRUCTURE] + self.faults[LeaseOutcome.ENGINE]
        if self.faults[LeaseOutcome.DATA] >= fleet.data_budget:
            self.given_up = f"{LeaseOutcome.DATA}: {message}"
        elif infrastructure >= fleet.infrastructure_budget:
            self.given_up = f"{outcome}: {message}"
        elif self.faults[LeaseOutcome.DEAD] >= MOST_DEATHS:
            self.given_up = f"{LeaseOutcome.DEAD}: {MOST_DEATHS} actors died on it"


class Evaluation:
    """Of one version."""

    def __init__(
        self, *, number: int, version: PolicyVersion, digest: str, plan: Plan, now: float, deadline: float
    ) -> None:
        self.number = number
        self.version = version
        self.digest = digest
        self.plan = plan
        self.opened_at = now
        self.deadline = deadline
        """Monotonic seconds, as `opened_at`."""
        self.slots = [EvaluationSlot() for _ in plan.questions]
        self._observations: dict[tuple[str, int], str] = {}
        self._num_settled = 0
        """Slots from the first on that are."""

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    @property
    def num_answers(self) -> int:
        return sum(slot.answer is not None for slot in self.slots)

    @property
    def num_free(self) -> int:
        return sum(slot.is_free for slot in self.slots)

    @property
    def is_settled(self) -> bool:
        while self._num_settled < self.num_slots and self.slots[self._num_settled].is_settled:
            self._num_settled += 1
        return self._num_settled == self.num_slots

    def restore(self, found: RecoveredEvaluation, fleet: FleetConfig) -> None:
        """Goes on from the ledger. Leases are adopted as their actors name them."""
        for number, known in found.slots.items():
            slot = self.slots[number]
            slot.next_attempt, slot.answer = known.next_attempt, known.answer
            for outcome, count in known.faults.items():
                for _ in range(count):
                    slot.note_end(outcome, known.messages[-1] if known.messages else "", fleet)
            if slot.answer is not None:
                # It came after all.
                slot.given_up = ""

    def free_slots(self, left_out: Iterable[str]) -> Iterable[int]:
        """In order, of the environments that may be leased."""
        closed = frozenset(left_out)
        for number, slot in enumerate(self.slots):
            if slot.is_free and self.plan.questions[number].task.environment not in closed:
                yield number

    def was_granted(self, number: int, slot: int, attempt: int) -> bool:
        """Whether there was such a lease of this evaluation."""
        return number == self.number and slot < self.num_slots and attempt < self.slots[slot].next_attempt

    def observation_of(self, slot: int) -> str | None:
        """The first observation's digest that other answers to the prompt had."""
        return self._observations.get(self.plan.questions[slot].prompt)

    def answer(self, slot: int, answer: Answer, observation_digest: str) -> None:
        self.slots[slot].answer = answer
        self.slots[slot].given_up = ""
        self._observations.setdefault(self.plan.questions[slot].prompt, observation_digest)

    def faults(self) -> dict[str, int]:
        """Slots that were given up, by the last fault."""
        return dict(Counter(slot.given_up[:200] for slot in self.slots if slot.given_up))

    def scores(self, pass_at: tuple[int, ...], threshold: float) -> dict[str, Score | None]:
        """By environment, and the mean of those if all of them have answers."""
        found: dict[str, Score | None] = {}
        for environment in self.plan.environments:
            answers = [
                slot.answer
                for slot, question in zip(self.slots, self.plan.questions, strict=True)
                if slot.answer is not None and question.task.environment == environment
            ]
            found[environment] = score(answers, pass_at=pass_at, threshold=threshold)
        known = [each for each in found.values() if each is not None]
        found[MEAN] = mean_score(known) if len(known) == len(found) else None
        return found
