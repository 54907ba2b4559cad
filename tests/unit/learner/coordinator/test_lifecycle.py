"""The scheduler and a real ledger, driven at random: crashes, late results, dead actors.

After every rule the invariants of the ledger hold; a crash forgets all memory and goes
on from what is on disk.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from learner.config import FleetConfig, LateGroup
from learner.coordinator.audit import audit
from learner.coordinator.decisions import Batch
from learner.coordinator.fleet import ReportedStats
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.leases import RolloutReport
from learner.coordinator.ledger import Ledger
from learner.coordinator.records import GroupDropped, TrajectoryState
from learner.coordinator.scheduler import Scheduler
from penstock.codec import version_from_wire
from penstock.errors import PeerLost, SessionFenced
from penstock.trajectory import Lease, PolicyVersion
from penstock.v1 import trajectory_pb2

from .fakes import Submitter, acquire, join, make_message, make_partial, make_scheduler, publish, restore

MAX_LAG = 2
ACTORS = ("a", "b", "c")


class Lifecycle(RuleBasedStateMachine):
    """One run: its scheduler and ledger, three actors, a trainer, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-test-"))
        self.now = 0.0
        self.ledger: Ledger
        self.scheduler: Scheduler
        self.submitters: dict[str, Submitter] = {}
        self.leases: list[tuple[str, Lease, PolicyVersion]] = []
        self.sent: list[trajectory_pb2.Trajectory] = []
        self.acknowledged: set[str] = set()
        self.checkpoint = 0
        self.late_group: LateGroup = "repair"
        self.trained_lineage: dict[int, tuple[str, ...]] = {}

    def teardown(self) -> None:
        self.ledger.close()
        assert not audit(self.folder / "ledger.sqlite").violations
        shutil.rmtree(self.folder)

    # -- the processes --------------------------------------------------------------------

    @initialize(late_group=st.sampled_from(get_args(LateGroup)))
    def start(self, late_group: LateGroup) -> None:
        self.late_group = late_group
        self.start_coordinator(trainer_lives=False)

    def start_coordinator(self, *, trainer_lives: bool) -> None:
        self.ledger = Ledger(self.folder / "ledger.sqlite", segment_bytes=1000)
        self.scheduler = make_scheduler(
            history=self.ledger,
            fleet=FleetConfig(
                progress_timeout_seconds=30.0,
                straggler_factor=2.0,
                group_deadline_seconds=12.0,
                late_group=self.late_group,
            ),
            groups_per_step=2,
            group_size=2,
            max_lag=MAX_LAG,
            num_steps=1000,
        )
        found = self.ledger.recover()
        restore(self.scheduler, found, now=self.now)
        self.submitters = {}
        if trainer_lives and found.newest is not None:
            self.scheduler.lineage.resume(found.newest.version)
        else:
            self.start_trainer()

    @rule()
    def start_trainer(self) -> None:
        """A trainer starts, or starts again, from the newest checkpoint."""
        self.commit()
        reopened = self.ledger.groups_trained_from(self.checkpoint)
        epoch = self.scheduler.lineage.open(self.checkpoint, reopened)
        self.trained_lineage = {s: ids for s, ids in self.trained_lineage.items() if s < self.checkpoint}
        self.publish(PolicyVersion(epoch, self.checkpoint))

    @rule(trainer_lives=st.booleans())
    def crash_coordinator(self, trainer_lives: bool) -> None:
        """Memory is gone; only what was committed stays. The trainer may go on, or start again as well."""
        assigned = self.scheduler.board.assigned
        self.ledger.close()
        self.start_coordinator(trainer_lives=trainer_lives)
        if trainer_lives:
            again = self.scheduler.board.assigned
            assert (again and again.group_ids) == (assigned and assigned.group_ids)

    @rule()
    def trainer_is_given_a_batch(self) -> None:
        version = self.scheduler.version
        assert version is not None
        self.scheduler.lineage.next_batch(version.epoch, version.step)
        self.commit()

    @rule(name=st.sampled_from(ACTORS), keeps_leases=st.booleans())
    def actor_joins(self, name: str, keeps_leases: bool) -> None:
        held = tuple(lease.lease_id for owner, lease, _ in self.leases if owner == name)
        session = join(self.scheduler, name, now=self.now, held=held if keeps_leases else ())
        self.submitters[name] = Submitter(self.scheduler, session)
        self.commit()

    # -- the work -------------------------------------------------------------------------

    @rule(name=st.sampled_from(ACTORS), num=st.integers(1, 6))
    def actor_acquires(self, name: str, num: int) -> None:
        version = self.scheduler.version
        if name not in self.submitters or version is None:
            return
        try:
            leases = acquire(self.scheduler, self.submitters[name].session_id, version, num, now=self.now)
        except (PeerLost, SessionFenced):
            del self.submitters[name]
            return
        self.commit()
        for lease in leases:
            began = self.goes_on_from(lease) if lease.continues else version
            self.leases.append((name, lease, began))

    def goes_on_from(self, lease: Lease) -> PolicyVersion:
        """The version of a handed over rollout's tokens, which the whole then is as old as."""
        kept = self.ledger.partial(lease.group_id, lease.slot)
        assert kept is not None, "what a lease goes on from is on disk"
        message = trajectory_pb2.Partial.FromString(kept[0])
        return version_from_wire(message.versions[0].version)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def actor_submits(self, data: st.DataObject) -> None:
        """Any actor may deliver any lease's result, at any time, however late."""
        _, lease, version = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.deliver(data.draw(st.sampled_from(ACTORS)), make_message(lease, version))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def actor_sends_again(self, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from(self.sent))
        known = message.trajectory_id in self.acknowledged
        verdict = self.deliver(data.draw(st.sampled_from(ACTORS)), message)
        if verdict is not None and known:
            assert verdict.is_duplicate

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([LeaseOutcome.DRAINED, LeaseOutcome.INFRASTRUCTURE]),
        hands_over=st.booleans(),
    )
    def actor_releases(self, data: st.DataObject, outcome: LeaseOutcome, hands_over: bool) -> None:
        name, lease, version = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        partial = make_partial(lease, version) if hands_over else None
        if name in self.submitters:
            try:
                self.submitters[name].release(lease, outcome, now=self.now, partial=partial)
            except (PeerLost, SessionFenced):
                del self.submitters[name]
        self.commit()

    @rule(name=st.sampled_from(ACTORS), stragglers=st.integers(0, 3))
    def busy_round(self, name: str, stragglers: int) -> None:
        """An actor plays all it can get but the oldest few, and the trainer takes what it can."""
        if name not in self.submitters:
            self.actor_joins(name, True)
        self.actor_acquires(name, 100)
        while len(self.leases) > stragglers:
            _, lease, version = self.leases.pop()
            self.deliver(name, make_message(lease, version))
        for _ in range(MAX_LAG + 1):
            self.trainer_steps()

    @rule(slow=st.sampled_from(ACTORS), quick=st.sampled_from(ACTORS))
    def one_straggles(self, slow: str, quick: str) -> None:
        """An actor holds leases without progress; another asks for work, and may be its rival."""
        for name in {slow, quick} - self.submitters.keys():
            self.actor_joins(name, True)
        self.actor_acquires(slow, 3)
        self.trainer_steps()
        self.time_passes(1.0, 14, True)
        self.actor_acquires(quick, 100)

    @rule(seconds=st.sampled_from([0.5, 1.0, 1.5]), times=st.integers(1, 30), alive=st.booleans())
    def time_passes(self, seconds: float, times: int, alive: bool) -> None:
        """Without heartbeats actors die; with them, their leases straggle and get rivals."""
        for _ in range(times):
            self.now += seconds
            if alive:
                self.actors_beat()
            self.scheduler.tick(self.now)
        self.commit()

    def actors_beat(self) -> None:
        version = self.scheduler.version
        for name, submitter in list(self.submitters.items()):
            held = [RolloutReport(lease.lease_id, 0, 0) for owner, lease, _ in self.leases if owner == name]
            try:
                self.scheduler.heartbeat(
                    submitter.session_id,
                    installed=version,
                    stats=ReportedStats(),
                    progress=held,
                    now=self.now,
                )
            except (PeerLost, SessionFenced):
                del self.submitters[name]

    @rule()
    def trainer_steps(self) -> None:
        version = self.scheduler.version
        assert version is not None
        batch = self.scheduler.lineage.next_batch(version.epoch, version.step)
        if not isinstance(batch, Batch):
            return
        for group in batch.groups:
            assert group.task.index == self.scheduler.grants.tasks.task(group.group_id).index
            for member in group.members:
                assert version.step - member.oldest_step <= MAX_LAG
        ids = tuple(member.trajectory_id for group in batch.groups for member in group.members)
        for group in batch.groups:
            of_group = [member.trajectory_id for member in group.members]
            payloads = map(
                trajectory_pb2.Trajectory.FromString, self.ledger.payloads(group.group_id, of_group)
            )
            assert [payload.trajectory_id for payload in payloads] == of_group
        self.trained_lineage[version.step] = ids
        self.publish(PolicyVersion(version.epoch, version.step + 1))

    @rule()
    def trainer_skips(self) -> None:
        version = self.scheduler.version
        assert version is not None
        if isinstance(self.scheduler.lineage.next_batch(version.epoch, version.step), Batch):
            self.scheduler.lineage.skip(version.epoch, version.step, "not finite")
        self.commit()

    @rule()
    def trainer_checkpoints(self) -> None:
        version = self.scheduler.version
        assert version is not None
        self.scheduler.lineage.checkpointed(version, "path", "digest", keep=1)
        self.checkpoint = version.step
        self.commit()

    # -- what always holds ------------------------------------------------------------------

    @invariant()
    def nothing_vanishes(self) -> None:
        totals = self.ledger.totals()
        assert totals.imbalance == 0
        assert totals.accepted == len(self.acknowledged)

    @invariant()
    def each_is_trained_once(self) -> None:
        trained = [name for ids in self.trained_lineage.values() for name in ids]
        assert len(trained) == len(set(trained))
        assert self.ledger.totals().by_state.get(TrajectoryState.TRAINED, 0) == len(trained)

    @invariant()
    def lag_is_bounded(self) -> None:
        assert self.ledger.totals().max_lag_trained <= MAX_LAG

    @invariant()
    def memory_and_disk_agree(self) -> None:
        on_disk = {group.group_id: group for group in self.ledger.recover().open_groups}
        assert on_disk.keys() == self.scheduler.groups.keys()
        for group_id, group in self.scheduler.groups.items():
            assert [m.trajectory_id for m in group.members] == [
                m.trajectory_id for m in on_disk[group_id].members
            ]

    @invariant()
    def what_is_handed_over_is_kept(self) -> None:
        for group in self.scheduler.groups.values():
            for number, slot in enumerate(group.slots):
                if slot.handed_over is not None:
                    assert self.ledger.partial(group.group_id, number) is not None

    @invariant()
    def every_live_lease_belongs_to_a_free_slot(self) -> None:
        for group in self.scheduler.groups.values():
            for slot in group.slots:
                assert not (slot.lease_ids and slot.filled)
                assert len(slot.lease_ids) <= 2
                for lease_id in slot.lease_ids:
                    assert self.scheduler.leases.get(lease_id) is not None
        live = sum(len(slot.lease_ids) for group in self.scheduler.groups.values() for slot in group.slots)
        assert live == len(self.scheduler.leases)

    # -- pieces -----------------------------------------------------------------------------

    def deliver(self, name: str, message: trajectory_pb2.Trajectory):  # type: ignore[no-untyped-def]
        """Submits; forgets the actor's session if the learner does not know it."""
        if name not in self.submitters:
            return None
        try:
            verdict = self.submitters[name](message, now=self.now)
        except (PeerLost, SessionFenced):
            del self.submitters[name]
            return None
        self.commit()
        if verdict.state is not None:
            assert message.trajectory_id not in self.acknowledged
            self.acknowledged.add(message.trajectory_id)
            self.sent.append(message)
        return verdict

    def publish(self, version: PolicyVersion) -> None:
        publish(self.scheduler, version)
        self.commit()

    def commit(self) -> None:
        self.scheduler.take_revocations()
        records = self.scheduler.take_records()
        for record in records:
            if isinstance(record, GroupDropped):
                assert record.state is not TrajectoryState.STALE, "lag is bounded without discarding"
        self.ledger.write_blocking(records)


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
