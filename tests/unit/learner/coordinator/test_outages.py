"""An environment that fails or hangs is left out, and the others go on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from learner.config import BreakerConfig
from learner.coordinator.decisions import Batch, Waiting
from learner.coordinator.explain import why
from learner.coordinator.fleet import EnvironmentUse, ReportedStats
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.leases import RolloutReport
from learner.coordinator.records import EventLogged, GroupDropped, TrajectoryState
from penstock.trajectory import Lease, PolicyVersion

from .fakes import Submitter, acquire, join, make_message, make_scheduler, publish, start

GOOD, BAD = "good", "bad"


class Run:
    """Two environments, one actor, and a clock."""

    def __init__(self, breaker: BreakerConfig | None = None, **schedule: int) -> None:
        self.scheduler = make_scheduler(breaker=breaker, environments=(GOOD, BAD), **schedule)
        self.version = start(self.scheduler)
        self.submit = Submitter(self.scheduler, join(self.scheduler))
        self.now = 0.0
        self.leases: dict[str, Lease] = {}
        """Of the bad environment: held, and without an answer."""
        self._hangs_since: dict[str, float] = {}

    def play(self, *, fails: bool = False, hangs: bool = False) -> int:
        """One round: takes all that is leased, and plays it. Returns how many good ones came to their end."""
        leases = acquire(self.scheduler, self.submit.session_id, self.version, now=self.now)
        for lease in leases:
            if lease.task.environment == GOOD or not (fails or hangs):
                self.submit(make_message(lease, self.version), now=self.now)
            elif fails:
                self.submit.release(lease, LeaseOutcome.INFRASTRUCTURE, "refused", now=self.now)
            else:
                self.leases[lease.lease_id] = lease
                self._hangs_since[lease.lease_id] = self.now
        return sum(lease.task.environment == GOOD for lease in leases)

    def train(self) -> int | None:
        """One step; returns how many of its groups are good ones, and None if there is no batch."""
        batch = self.scheduler.lineage.next_batch(self.version.epoch, self.version.step)
        if isinstance(batch, Waiting):
            return None
        self.version = publish(self.scheduler, PolicyVersion(self.version.epoch, self.version.step + 1))
        return sum(group.task.environment == GOOD for group in batch.groups)

    def pass_time(self, seconds: int, *, uses: Sequence[EnvironmentUse] = ()) -> None:
        for _ in range(seconds):
            self.now += 1.0
            progress = [RolloutReport(name, 3, 0, self.now - self._hangs_since[name]) for name in self.leases]
            self.scheduler.heartbeat(
                self.submit.session_id,
                installed=self.version,
                stats=ReportedStats(),
                progress=progress,
                now=self.now,
                uses=uses,
            )
            self.scheduler.tick(self.now)
            revoked = {revocation.lease_id for revocation in self.scheduler.take_revocations()}
            self.leases = {name: lease for name, lease in self.leases.items() if name not in revoked}

    def events(self, kind: str) -> list[str]:
        records = self.scheduler.take_records()
        return [r.message for r in records if isinstance(r, EventLogged) and r.kind == kind]


def test_a_failing_environment_is_left_out_and_its_tasks_and_slots_are_spared():
    run = Run(groups_per_step=2, max_lag=1)
    for _ in range(20):
        run.play(fails=True)
        run.train()
    assert run.version.step >= 5, "steps go on, of good groups only"
    watched = run.scheduler.outages.environments[BAD]
    assert watched.faults.counts.total() == 3, "it was asked no more after that"
    assert watched.num_groups_cut > 0


def test_a_hanging_environment_gives_its_places_back():
    run = Run(groups_per_step=2, max_lag=1)
    uses = [EnvironmentUse(BAD, 100, 10.0)]
    for _ in range(3):
        run.play(hangs=True)
        run.train()
    assert run.train() is None, "groups that hang hold the lag bound"
    run.pass_time(6, uses=uses)
    (told,) = run.events("left_out")
    assert "rollouts wait for longer than 5.0 s" in told
    assert not run.leases, "their leases were revoked"
    for _ in range(3):
        assert run.play(hangs=True) >= 4
        assert run.train() == 2, "its places are the good one's now"
    assert any("environment bad is left out: " in line for line in why(run.scheduler, None, run.now))


def test_the_mixture_is_as_before_once_it_answers_again():
    run = Run(groups_per_step=2, max_lag=1)
    run.play(fails=True)
    assert run.scheduler.outages.environments[BAD].breaker.may_lease is False
    run.pass_time(6)
    mixtures = []
    for _ in range(8):
        run.play()
        mixtures.append(run.train())
    assert mixtures[-4:] == [1, 1, 1, 1]
    assert run.events("back")


def test_only_probes_are_leased_until_they_end_well():
    run = Run(groups_per_step=4, max_lag=3, group_size=4)
    run.play(fails=True)
    run.train()
    run.pass_time(6)
    leases = acquire(run.scheduler, run.submit.session_id, run.version, now=run.now)
    assert sum(lease.task.environment == BAD for lease in leases) == 2


@pytest.mark.parametrize("policy", ["drop", "partial", "wait"])
def test_unfinished_groups_end_as_configured(policy: str):
    run = Run(BreakerConfig(open_groups=policy), groups_per_step=1, max_lag=3, group_size=4)  # type: ignore[arg-type]
    leases = acquire(run.scheduler, run.submit.session_id, run.version)
    bad = [lease for lease in leases if lease.task.environment == BAD]
    per_group = [list(members) for _, members in itertools.groupby(bad, lambda lease: lease.group_id)]
    (filled, missing), (other, _) = (per_group[0][:2], per_group[0][2:]), (per_group[1], None)
    for lease in filled:
        run.submit(make_message(lease, run.version))
    for lease in [*missing, *other][:3]:
        run.submit.release(lease, LeaseOutcome.INFRASTRUCTURE, "refused")
    dropped = {
        record.group_id: record.state
        for record in run.scheduler.take_records()
        if isinstance(record, GroupDropped)
    }
    expected = {
        "drop": {filled[0].group_id, other[0].group_id},
        "partial": {other[0].group_id},
        "wait": set(),
    }
    assert dropped.keys() == expected[policy]
    assert set(dropped.values()) <= {TrajectoryState.GROUP_DROPPED}
    partial = run.scheduler.groups.get(filled[0].group_id)
    if policy == "partial":
        assert partial is not None
        assert partial.is_ready
    elif policy == "wait":
        assert partial is not None
        assert not partial.is_settled


def test_complete_groups_of_an_environment_that_is_left_out_are_trained():
    run = Run(groups_per_step=2, max_lag=1)
    leases = acquire(run.scheduler, run.submit.session_id, run.version, num=4)
    for lease in leases:
        run.submit(make_message(lease, run.version))
    run.play(fails=True)
    batch = run.scheduler.lineage.next_batch(run.version.epoch, run.version.step)
    assert isinstance(batch, Batch)
    assert {group.task.environment for group in batch.groups} == {GOOD, BAD}


def test_with_every_environment_left_out_nothing_is_leased_and_no_task_is_used_up():
    run = Run(groups_per_step=2, max_lag=1)
    leases = acquire(run.scheduler, run.submit.session_id, run.version)
    for lease in leases:
        run.submit.release(lease, LeaseOutcome.INFRASTRUCTURE, "refused")
    before = run.scheduler.grants.next_group_id
    granted, reason = run.scheduler.acquire(
        run.submit.session_id, run.version, f"digest of step {run.version.step}", 8, run.now
    )
    assert not granted
    assert "every environment is left out" in reason
    assert run.scheduler.grants.next_group_id == before


def test_an_engine_that_fails_says_nothing_of_the_environment():
    run = Run(groups_per_step=4, max_lag=3)
    for lease in acquire(run.scheduler, run.submit.session_id, run.version):
        run.submit.release(lease, LeaseOutcome.ENGINE, "out of memory")
    assert all(watched.breaker.may_lease for watched in run.scheduler.outages.environments.values())
    assert not any(watched.faults.last for watched in run.scheduler.outages.environments.values())


def test_faults_of_tasks_leave_no_environment_out():
    run = Run(groups_per_step=4, max_lag=3)
    for lease in acquire(run.scheduler, run.submit.session_id, run.version):
        run.submit.release(lease, LeaseOutcome.DATA, "no such task")
    assert all(watched.breaker.may_lease for watched in run.scheduler.outages.environments.values())
