"""What slots go on from: partial rollouts that came to nothing where they were played."""

from __future__ import annotations

from collections.abc import Sequence

from learner.coordinator import partials
from learner.coordinator.board import Board
from learner.coordinator.groups import HandedOver
from learner.coordinator.journal import Journal
from learner.coordinator.leases import LiveLease
from learner.coordinator.lineage import Lineage
from learner.coordinator.partials import SentPartial
from learner.coordinator.records import ItemsRefused, PartialStored
from learner.coordinator.validation import Limits, Rejected


class TakeOvers:
    """Keeps what was played of rollouts that come to nothing: their slots' next leases go on from it."""

    def __init__(self, *, board: Board, lineage: Lineage, limits: Limits, journal: Journal) -> None:
        self._board = board
        self._lineage = lineage
        self._limits = limits
        self._journal = journal

    def keep_streamed(self, leases: Sequence[LiveLease], whose: str) -> None:
        """Keeps what was told of rollouts that come to nothing: the slots' next leases go on from it."""
        num_kept = num_tokens = num_told = 0
        for lease in leases:
            streamed = self._board.streams.take(lease.lease_id)
            kept = None if streamed is None else self.take_over(lease, streamed)
            if kept is not None:
                num_kept, num_tokens = num_kept + 1, num_tokens + kept.num_tokens
                num_told += lease.num_tokens
        if num_kept:
            self._journal.event(
                "kept",
                f"{num_kept} rollouts of {whose}, with {num_tokens} of the {num_told} tokens that it told of",
            )

    def give_back(self, lease: LiveLease) -> None:
        """What it went on from may be gone on from again, unless there is more by now: it ended by no fault."""
        group = self._board.groups.get(lease.group_id)
        if group is not None:
            slot = group.slots[lease.slot]
            slot.handed_over = slot.handed_over or lease.continues

    def take_over(self, lease: LiveLease, partial: SentPartial) -> HandedOver | None:
        """Keeps what was played elsewhere, unless its group is closed or it is unsound."""
        group = self._board.groups.get(lease.group_id)
        if group is None or group.slots[lease.slot].filled is not None:
            return None
        try:
            kept = partials.check(partial, self._limits, self._lineage.versions, group, self._lineage.epoch)
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
