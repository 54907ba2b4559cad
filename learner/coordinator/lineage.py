"""The trainer's side of a run: from which checkpoint it trains, on what, and which versions it made.

Pure, like the scheduler that it belongs to. A lineage is the life of one trainer: it
starts from a checkpoint, and every version that it publishes carries its epoch. What
lineages before it consumed from that checkpoint on is void.
"""

from __future__ import annotations

from collections.abc import Sequence

from learner.config import ScheduleConfig
from learner.coordinator.batches import WaitFor, choose
from learner.coordinator.board import Board
from learner.coordinator.decisions import Batch, Waiting
from learner.coordinator.groups import Group
from learner.coordinator.journal import Journal
from learner.coordinator.records import (
    BatchAssigned,
    BatchTrained,
    CheckpointWritten,
    LineageOpened,
    RunFinished,
    TrajectoryState,
    VersionPublished,
)
from penstock.errors import ProtocolError, SessionFenced
from penstock.trajectory import PolicyVersion


class Lineage:
    """Versions, and the batches that they are made of."""

    def __init__(self, *, schedule: ScheduleConfig, board: Board, journal: Journal) -> None:
        self.epoch = 0
        self.version: PolicyVersion | None = None
        """The newest of this epoch."""
        self.versions: dict[PolicyVersion, str] = {}
        """Digest of every version ever published."""
        self.finished = False
        self.waiting: Waiting | None = None
        """What the trainer was told that it waits for; None while it trains."""
        self._from_step = 0
        self._assigned_before: tuple[int, ...] = ()
        self._schedule = schedule
        self._board = board
        self._journal = journal

    def restore(
        self, *, epoch: int, from_step: int, versions: dict[PolicyVersion, str], assigned: Sequence[int]
    ) -> None:
        """Goes on from a ledger. Without `resume`, a trainer must open a lineage first."""
        self.epoch, self._from_step, self.versions = epoch, from_step, dict(versions)
        self._assigned_before = tuple(assigned)

    def resume(self, version: PolicyVersion) -> None:
        """The trainer of the newest lineage is alive: it goes on from its newest version."""
        self.version = version
        if self._assigned_before:
            groups = tuple(self._board.groups[group_id] for group_id in self._assigned_before)
            self._board.assigned = Batch(version.step, groups)

    @property
    def _first(self) -> PolicyVersion:
        return PolicyVersion(self.epoch, self._from_step)

    def open(self, step: int, reopened: Sequence[Group]) -> int:
        """A trainer starts from checkpoint `step`. Returns the epoch of its versions.

        reopened: the groups that steps >= `step` had trained.
        """
        self.epoch += 1
        self._from_step = step
        self.version, self._board.assigned, self.waiting, self.finished = None, None, None, False
        self._board.hold(reopened, given={group.group_id for group in reopened})
        reborn = self._board.bear_again(self._first)
        max_lag = self._schedule.max_lag
        self._journal.record(LineageOpened(epoch=self.epoch, step=step, max_lag=max_lag, reborn=reborn))
        self._journal.event(
            "lineage", f"epoch {self.epoch} starts from step {step}; {len(reopened)} groups to train again"
        )
        return self.epoch

    def published(
        self,
        version: PolicyVersion,
        digest: str,
        manifest: bytes,
        metrics: str,
        group_ids: Sequence[int] = (),
    ) -> bool:
        """A version exists, made from the groups assigned to the step before it; a lineage's first from none.

        False if it was published already. Raises ProtocolError, SessionFenced.
        """
        self.require_epoch(version.epoch)
        if version in self.versions:
            if self.versions[version] != digest:
                raise ProtocolError(
                    f"version {version} has digest {self.versions[version]}; a second publication says {digest}"
                )
            return False
        if self.version is None:
            self._check_first(version, group_ids)
        else:
            self._train_assigned(version, group_ids)
        self.version = version
        self.versions[version] = digest
        self._journal.record(
            VersionPublished(version=version, digest=digest, manifest=manifest, metrics=metrics)
        )
        self._board.step_taken()
        self._drop_overdue()
        return True

    def next_batch(self, epoch: int, step: int) -> Batch | Waiting:
        """The batch of a step: the same for every rank that asks. Raises ProtocolError, SessionFenced."""
        self.require_epoch(epoch)
        if self.version is None or step != self.version.step:
            raise ProtocolError(f"asked for the batch of step {step}; the newest version is {self.version}")
        if self._board.assigned is not None:
            return self._board.assigned
        open_groups = self._board.groups.values()
        choice = choose(open_groups, version=step, groups_per_step=self._schedule.groups_per_step)
        if isinstance(choice, WaitFor):
            self.waiting = Waiting(choice.reason, choice.groups)
            return self.waiting
        self.waiting = None
        self._board.assigned = Batch(step, choice.groups)
        self._journal.record(BatchAssigned(step=step, group_ids=self._board.assigned.group_ids))
        return self._board.assigned

    def skip(self, epoch: int, step: int, reason: str) -> None:
        """The assigned batch gave a non-finite loss or gradient: its trajectories are set aside."""
        self.require_epoch(epoch)
        assigned = self._board.assigned
        if assigned is None or assigned.step != step:
            return
        self._board.assigned = None
        ids = [member.trajectory_id for group in assigned.groups for member in group.members]
        self._journal.event("non_finite", f"step {step} was skipped: {reason}; quarantined {', '.join(ids)}")
        for group in assigned.groups:
            self._board.drop(group, TrajectoryState.QUARANTINED, reason)

    def checkpointed(
        self, version: PolicyVersion, path: str, digest: str, *, keep: int, keep_payloads: bool = False
    ) -> None:
        self.require_epoch(version.epoch)
        written = CheckpointWritten(
            version=version, path=path, digest=digest, keep=keep, keep_payloads=keep_payloads
        )
        self._journal.record(written)
        self._journal.event("checkpoint", f"version {version} at {path}")

    def finish(self, epoch: int, step: int) -> None:
        """The last step is trained: what is still leased will not be."""
        self.require_epoch(epoch)
        if self.finished:
            return
        self.finished = True
        self._journal.record(RunFinished(step=step))
        self._journal.event("finished", f"after step {step}")
        for group in list(self._board.groups.values()):
            self._board.drop(group, TrajectoryState.SURPLUS, "the run is finished", quietly=True)

    def require_epoch(self, epoch: int) -> None:
        """Raises SessionFenced."""
        if epoch != self.epoch:
            raise SessionFenced(f"a trainer of epoch {epoch} was replaced by epoch {self.epoch}")

    def _check_first(self, version: PolicyVersion, group_ids: Sequence[int]) -> None:
        if version != self._first or group_ids:
            raise ProtocolError(
                f"version {version}, trained on groups {list(group_ids)}, was published first in a lineage; "
                f"expected {self._first}, trained on none"
            )

    def _train_assigned(self, version: PolicyVersion, group_ids: Sequence[int]) -> None:
        batch = self._board.assigned
        if batch is None or version.step != batch.step + 1:
            raise ProtocolError(
                f"version {version} was published without the batch of step {version.step - 1}"
            )
        if tuple(group_ids) != batch.group_ids:
            raise ProtocolError(
                f"version {version} was trained on groups {list(group_ids)}; step {batch.step} was given "
                f"{list(batch.group_ids)}"
            )
        self._board.assigned = None
        for group in batch.groups:
            self._board.close(group)
        self._journal.record(BatchTrained(step=batch.step, group_ids=batch.group_ids))

    def _drop_overdue(self) -> None:
        """Ends groups past their due version: only a run resumed with a smaller max_lag has any."""
        assert self.version is not None
        for group in list(self._board.groups.values()):
            if group.due < self.version.step and not self._board.is_assigned(group):
                reason = f"due by version {group.due}, now {self.version}"
                self._board.drop(group, TrajectoryState.STALE, reason)
