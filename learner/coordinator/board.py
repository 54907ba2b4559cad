"""The groups that are open and the leases on them: how each of them ends.

Both sides of the scheduler work on one board: actors' leases fill its slots, and the
trainer takes complete groups off it (`learner.coordinator.lineage`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from learner.config import FleetConfig
from learner.coordinator.admission import Admission
from learner.coordinator.decisions import Batch, Revocation
from learner.coordinator.groups import Group, LeaseOutcome, Slot
from learner.coordinator.journal import Journal
from learner.coordinator.leases import LeaseTable, LiveLease
from learner.coordinator.records import GroupDropped, LeaseEnded, TrajectoryState
from learner.coordinator.sieve import Sieve
from learner.coordinator.streams import Streams
from penstock.trajectory import PolicyVersion

DEATHS_BEFORE_QUARANTINE = 3
_RECENT_GROUPS = 1024


class Board:
    """Open groups by id, those that were closed lately, and live leases."""

    def __init__(
        self,
        *,
        fleet: FleetConfig,
        admission: Admission,
        streams: Streams,
        journal: Journal,
        sieve: Sieve | None = None,
    ) -> None:
        self.groups: dict[int, Group] = {}
        self.streams = streams
        self.leases = LeaseTable(progress_timeout=fleet.progress_timeout_seconds)
        self.assigned: Batch | None = None
        """What the trainer works on: its groups are on the board still, and closed to actors."""
        self._fleet = fleet
        self._admission = admission
        self._journal = journal
        self._sieve = sieve
        self._recent: dict[int, Group] = {}
        self._maybe_free: set[int] = set()
        self._revocations: list[Revocation] = []

    def find(self, group_id: int) -> Group | None:
        """A group that is open, or was until lately."""
        return self.groups.get(group_id) or self._recent.get(group_id)

    def is_assigned(self, group: Group) -> bool:
        return self.assigned is not None and group.group_id in self.assigned.group_ids

    def free_slot(self, born: int, may_lease: Callable[[str], bool]) -> tuple[Group, int] | None:
        """The first free slot of the oldest group that was born at version `born` or before.

        may_lease: whether an environment's groups are leased now.
        """
        return next(self._with_free_slots(born, may_lease), None)

    def num_free_slots(self, born: int, may_lease: Callable[[str], bool]) -> int:
        return sum(group.num_free for group, _ in self._with_free_slots(born, may_lease))

    def _with_free_slots(self, born: int, may_lease: Callable[[str], bool]) -> Iterator[tuple[Group, int]]:
        """Groups, the oldest first, and the first free slot of each."""
        for group_id in sorted(self._maybe_free):
            group = self.groups.get(group_id)
            number = None if group is None else group.first_free
            if group is None or number is None:
                self._maybe_free.discard(group_id)
            elif (
                group.born.step <= born and not self.is_assigned(group) and may_lease(group.task.environment)
            ):
                yield group, number

    def open(self, group: Group) -> None:
        self.groups[group.group_id] = group
        self._maybe_free.add(group.group_id)

    def hold(self, groups: Sequence[Group], *, given: Collection[int] = ()) -> None:
        """Takes groups from the ledger.

        given: those that the trainer was given at some time: it is given them again as they were.
        """
        for group in groups:
            for slot in group.missing_slots:
                slot.given_up = group.group_id in given or self._is_spent(slot)
            group.due = self._admission.due(group.born.step)
            self._recent.pop(group.group_id, None)
            self.open(group)
        self.groups = dict(sorted(self.groups.items()))

    def bear_again(self, first: PolicyVersion) -> tuple[tuple[int, PolicyVersion], ...]:
        """Groups born at or after the version that a lineage starts from are born again under it.

        They may be more than max_lag allows at once, so they take turns: each is due when those
        before it can be trained, as it was before, and is born max_lag steps ahead of that.
        Until its birth no free slot of it is leased, so that nothing in it can become too old.
        Returns (group_id, born) of each.
        """
        ordered = sorted(self.groups.values(), key=lambda group: (group.born.step, group.group_id))
        reborn = []
        for turn, group in enumerate(ordered):
            if group.born.step >= first.step:
                step = max(first.step, self._admission.born_in_turn(first.step, turn))
                group.born = PolicyVersion(first.epoch, step)
                group.due = self._admission.due(step)
                reborn.append((group.group_id, group.born))
        return tuple(reborn)

    def end_lease(
        self, lease: LiveLease, outcome: LeaseOutcome, *, message: str = "", revoke: str = ""
    ) -> None:
        self.leases.end(lease.lease_id)
        self.streams.discard(lease.lease_id)
        if outcome is not LeaseOutcome.FILLED:
            ended = LeaseEnded(lease.group_id, lease.slot, lease.attempt, outcome, message[:500])
            self._journal.record(ended)
        if revoke:
            self._revocations.append(Revocation(lease.session_id, lease.lease_id, revoke))
        group = self.groups.get(lease.group_id)
        if group is None:
            return
        slot = group.slots[lease.slot]
        if lease.lease_id in slot.lease_ids:
            slot.lease_ids.remove(lease.lease_id)
        if slot.filled is None:
            self._maybe_free.add(group.group_id)
            self._count_end(slot, outcome)
        self.end_if_useless(group)

    def _count_end(self, slot: Slot, outcome: LeaseOutcome) -> None:
        """Gives an unfilled slot up when its budget of faults is spent."""
        slot.faults[outcome] += 1
        slot.given_up = self._is_spent(slot)

    def _is_spent(self, slot: Slot) -> bool:
        return (
            slot.faults[LeaseOutcome.INFRASTRUCTURE] + slot.faults[LeaseOutcome.ENGINE]
            >= self._fleet.infrastructure_budget
            or slot.faults[LeaseOutcome.DATA] >= self._fleet.data_budget
        )

    def revoke_leases(self, slot: Slot, reason: str) -> None:
        for lease_id in tuple(slot.lease_ids):
            lease = self.leases.get(lease_id)
            if lease is not None:
                self.end_lease(lease, LeaseOutcome.REVOKED, revoke=reason)

    def end_if_useless(self, group: Group) -> None:
        if group.group_id not in self.groups or self.is_assigned(group):
            return
        if len(group.deaths) >= DEATHS_BEFORE_QUARANTINE:
            self.drop(group, TrajectoryState.QUARANTINED, f"{len(group.deaths)} actors died on its task")
        elif not group.is_settled:
            return
        elif not group.is_ready:
            self.drop(group, TrajectoryState.GROUP_DROPPED, "fewer than two trajectories after its faults")
        elif self._sieve is not None and self._sieve.drops(group):
            self.drop(
                group, TrajectoryState.GROUP_DROPPED, "equal rewards teach nothing; another takes its place"
            )

    def train_without_missing(self, group: Group, reason: str) -> None:
        """Gives up every slot that is not filled: what there is of the group is trained."""
        for slot in group.missing_slots:
            self.revoke_leases(slot, reason)
            slot.given_up = True
        self.end_if_useless(group)

    def drop(self, group: Group, state: TrajectoryState, reason: str, *, quietly: bool = False) -> None:
        """Closes a group untrained: its pending trajectories end in `state`."""
        self.close(group)
        group.is_quarantined = state is TrajectoryState.QUARANTINED
        self._journal.record(GroupDropped(group_id=group.group_id, state=state, reason=reason))
        if not quietly:
            self._journal.event("dropped", f"group {group.group_id} ({group.task}): {reason}")

    def close(self, group: Group) -> None:
        """Holds a group no more, but remembers for a while what belonged to it."""
        del self.groups[group.group_id]
        self._recent[group.group_id] = group
        while len(self._recent) > _RECENT_GROUPS:
            del self._recent[next(iter(self._recent))]
        for slot in group.slots:
            self.revoke_leases(slot, "its group is trained or dropped")

    def step_taken(self) -> None:
        """A version was published: the next step may drop as many uninformative groups again."""
        if self._sieve is not None:
            self._sieve.reset()

    def take_revocations(self) -> list[Revocation]:
        """What actors must be told."""
        revocations, self._revocations = self._revocations, []
        return revocations
