"""Who gets which lease. Pure.

A free slot of the oldest group comes first, then a rival for a straggler, then a new group,
as far as admission has room. When there is less than actors ask for, each gets a part.
"""

from __future__ import annotations

import math

from learner.config import FleetConfig, ScheduleConfig
from learner.coordinator.admission import Admission
from learner.coordinator.board import Board
from learner.coordinator.fleet import Fleet, Session
from learner.coordinator.groups import Group, HandedOver, Slot
from learner.coordinator.journal import Journal
from learner.coordinator.outages import Outages
from learner.coordinator.partials import MAX_BYTES_A_GRANT
from learner.coordinator.records import GroupOpened, LeaseGranted
from learner.coordinator.stragglers import Stragglers
from learner.coordinator.tasks import TaskOrder
from penstock.seeds import derive_seed
from penstock.trajectory import Lease, PolicyVersion, Sampling


class Grants:
    """Opens groups, and grants leases on their slots."""

    def __init__(
        self,
        *,
        schedule: ScheduleConfig,
        config: FleetConfig,
        sampling: Sampling,
        tasks: TaskOrder,
        fleet: Fleet,
        admission: Admission,
        board: Board,
        stragglers: Stragglers,
        outages: Outages,
        journal: Journal,
    ) -> None:
        self.next_group_id = 0
        self.num_continued = 0
        """Leases that went on from what another actor had played."""
        self._schedule = schedule
        self._config = config
        self._sampling = sampling
        self.tasks = tasks
        self._fleet = fleet
        self._admission = admission
        self._board = board
        self._stragglers = stragglers
        self._outages = outages
        self._journal = journal

    def grant(
        self, session: Session, version: PolicyVersion, installed: PolicyVersion, max_leases: int, now: float
    ) -> tuple[list[Lease], str]:
        """Up to `max_leases`, to an actor that asks under a version that it has installed; if none, says why."""
        leases: list[Lease] = []
        num_bytes = 0
        for _ in range(self._share(session, version, installed, max_leases)):
            found = (
                self._board.free_slot(installed.step, self._outages.may_lease)
                or self._stragglers.slot_for(session.session_id, installed.step, self._outages.may_lease)
                or self._open_group(version, installed)
            )
            if isinstance(found, str):
                session.num_asked = 0 if leases else max_leases
                return leases, "" if leases else found
            group, number = found
            handed_over = continuation(group.slots[number], installed)
            num_bytes += handed_over.num_bytes if handed_over else 0
            if leases and num_bytes > MAX_BYTES_A_GRANT:
                break
            leases.append(self._grant(group, number, session.session_id, handed_over, now))
        session.num_asked = 0
        return leases, ""

    def _share(
        self, session: Session, version: PolicyVersion, installed: PolicyVersion, max_leases: int
    ) -> int:
        """What of the room is this actor's, while others wait for some too: in proportion to what they ask for.

        At least one, so that no room is left over.
        """
        others = sum(other.num_asked for other in self._fleet.sessions() if other is not session)
        if not others:
            return max_leases
        num_groups = self._admission.num_groups(
            version=version.step, born=installed.step, num_open=len(self._board.groups)
        )
        room = num_groups * self._schedule.group_size
        room += self._board.num_free_slots(installed.step, self._outages.may_lease)
        share = math.ceil(room * max_leases / (max_leases + others))
        return min(max(share, 1), max_leases)

    def _open_group(self, version: PolicyVersion, installed: PolicyVersion) -> tuple[Group, int] | str:
        refusal = self._admission.refusal(
            version=version.step, born=installed.step, num_open=len(self._board.groups)
        )
        if refusal is not None:
            return refusal
        group_id = self.tasks.next_group(self.next_group_id, self._outages.may_lease)
        if group_id is None:
            return "every environment is left out: `penstock why` says for what reason"
        self.next_group_id = group_id + 1
        group = Group(
            group_id=group_id,
            task=self.tasks.task(group_id),
            born=installed,
            due=self._admission.due(installed.step),
            slots=[Slot() for _ in range(self._schedule.group_size)],
        )
        self._board.open(group)
        self._journal.record(
            GroupOpened(group_id=group_id, task=group.task, born=installed, num_slots=len(group.slots))
        )
        return group, 0

    def _grant(
        self, group: Group, number: int, session_id: str, handed_over: HandedOver | None, now: float
    ) -> Lease:
        slot = group.slots[number]
        if handed_over is not None:
            # Once: should this lease come to a fault, what it went on from may be the cause.
            slot.handed_over = None
            self.num_continued += 1
        attempt = slot.next_attempt
        slot.next_attempt += 1
        rival = bool(slot.lease_ids)
        lease = self._board.leases.grant(
            group_id=group.group_id, slot=number, attempt=attempt, session_id=session_id, now=now
        )
        slot.lease_ids.append(lease.lease_id)
        self._outages.leased(group.task.environment, lease.lease_id)
        lease.continues = handed_over
        self._journal.record(
            LeaseGranted(group_id=group.group_id, slot=number, attempt=attempt, session_id=session_id)
        )
        return Lease(
            lease_id=lease.lease_id,
            group_id=group.group_id,
            slot=number,
            attempt=attempt,
            task=group.task,
            sampling=self._sampling_of(group.group_id, number, attempt),
            progress_timeout_seconds=self._config.progress_timeout_seconds,
            rival=rival,
            continues=handed_over is not None,
        )

    def _sampling_of(self, group_id: int, slot: int, attempt: int) -> Sampling:
        sampling = self._sampling
        if sampling.seed == 0:
            return sampling
        return Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=derive_seed(sampling.seed, group_id, slot, attempt),
        )


def continuation(slot: Slot, installed: PolicyVersion) -> HandedOver | None:
    """What a lease of the slot goes on from. A straggler's rival begins anew: it may be what is slow."""
    handed_over = slot.handed_over
    if handed_over is None or slot.lease_ids or handed_over.newest > installed:
        return None
    return handed_over
