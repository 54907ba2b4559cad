"""Slow rollouts get a rival elsewhere; late groups are ended as the configuration says."""

from __future__ import annotations

import pytest

from learner.config import FleetConfig
from learner.coordinator.decisions import Batch, Waiting
from learner.coordinator.groups import Group
from learner.coordinator.leases import RolloutReport
from learner.coordinator.records import EventLogged, GroupDropped, TrajectoryState
from learner.coordinator.scheduler import Scheduler
from learner.coordinator.stragglers import Pace
from penstock.trajectory import Lease, PolicyVersion

from .fakes import Submitter, acquire, digest_of, join, make_message, make_scheduler, publish, start


def pass_time(scheduler: Scheduler, seconds: range, tokens: dict[str, dict[Lease, float]]) -> None:
    """Ticks once a second; every session reports its leases, with tokens written at the rate given."""
    for now in seconds:
        for session_id, rates in tokens.items():
            progress = [RolloutReport(lease.lease_id, int(rate * now), 0) for lease, rate in rates.items()]
            version = scheduler.version
            scheduler.heartbeat(
                session_id, installed=version, stats=_stats(), progress=progress, now=float(now)
            )
        scheduler.tick(float(now))


def usual_rollouts(scheduler: Scheduler, version: PolicyVersion, *, num: int = 8) -> None:
    """Some rollouts of three tokens that took two seconds each."""
    submit = Submitter(scheduler, join(scheduler, "usual"))
    for lease in acquire(scheduler, submit.session_id, version, num=num):
        submit(make_message(lease, version), now=2.0)
    scheduler.leave(submit.session_id, "", 2.0)


def test_a_straggler_gets_a_rival_on_another_actor_and_the_first_result_wins():
    scheduler = make_scheduler(groups_per_step=8, max_lag=4)
    version = start(scheduler)
    usual_rollouts(scheduler, version)
    slow, fast = Submitter(scheduler, join(scheduler, "slow")), Submitter(scheduler, join(scheduler, "fast"))
    straggler = acquire(scheduler, slow.session_id, version, num=1, now=2.0)[0]
    pass_time(scheduler, range(3, 9), {slow.session_id: {straggler: 0.1}, fast.session_id: {}})
    early = acquire(scheduler, fast.session_id, version, num=1, now=9.0)[0]
    assert (early.group_id, early.slot) != (straggler.group_id, straggler.slot), "not yet 4 times the usual"
    pass_time(scheduler, range(9, 13), {slow.session_id: {straggler: 0.1}, fast.session_id: {early: 3.0}})
    own = acquire(scheduler, slow.session_id, version, num=2, now=12.0)
    assert not any(lease.rival for lease in own), "an actor does not race itself"
    rival = acquire(scheduler, fast.session_id, version, num=1, now=12.0)[0]
    assert (rival.group_id, rival.slot, rival.rival) == (straggler.group_id, straggler.slot, True)
    another = Submitter(scheduler, join(scheduler, "another", now=12.0))
    assert not acquire(scheduler, another.session_id, version, num=1, now=12.0)[0].rival, (
        "one rival is enough"
    )
    assert fast(make_message(rival, version), now=12.0).state is TrajectoryState.PENDING
    assert [r.lease_id for r in scheduler.take_revocations()] == [straggler.lease_id]
    assert slow(make_message(straggler, version), now=12.0).state is TrajectoryState.SURPLUS


def test_a_straggler_that_ends_first_revokes_its_rival():
    scheduler, straggler, slow, rival, fast = _race()
    version = scheduler.version
    assert version is not None
    assert slow(make_message(straggler, version), now=12.0).state is TrajectoryState.PENDING
    assert [(r.session_id, r.lease_id) for r in scheduler.take_revocations()] == [
        (fast.session_id, rival.lease_id)
    ]
    assert fast(make_message(rival, version), now=12.0).state is TrajectoryState.SURPLUS


def test_a_rival_plays_on_when_the_straggler_dies():
    scheduler, straggler, slow, rival, fast = _race()
    scheduler.leave(slow.session_id, "gone", 12.0)
    assert scheduler.groups[straggler.group_id].slots[straggler.slot].lease_ids == [rival.lease_id]
    version = scheduler.version
    assert version is not None
    assert fast(make_message(rival, version), now=12.0).state is TrajectoryState.PENDING


def _race() -> tuple[Scheduler, Lease, Submitter, Lease, Submitter]:
    scheduler = make_scheduler(groups_per_step=8, max_lag=4)
    version = start(scheduler)
    usual_rollouts(scheduler, version)
    slow, fast = Submitter(scheduler, join(scheduler, "slow")), Submitter(scheduler, join(scheduler, "fast"))
    straggler, other = acquire(scheduler, slow.session_id, version, num=2, now=2.0)
    rates = {straggler: 0.1, other: 2.0}
    pass_time(scheduler, range(3, 13), {slow.session_id: rates, fast.session_id: {}})
    rival = acquire(scheduler, fast.session_id, version, num=1, now=12.0)[0]
    assert rival.rival
    return scheduler, straggler, slow, rival, fast


def test_a_long_rollout_at_the_usual_pace_is_not_raced():
    scheduler = make_scheduler(groups_per_step=8, max_lag=4)
    version = start(scheduler)
    usual_rollouts(scheduler, version)
    busy, idle = join(scheduler, "busy"), join(scheduler, "idle")
    long = acquire(scheduler, busy, version, num=1, now=2.0)[0]
    pass_time(scheduler, range(3, 60), {busy: {long: 1.5}, idle: {}})
    leases = acquire(scheduler, idle, version, now=60.0)
    assert leases
    assert not any(lease.rival for lease in leases)


def test_no_rivals_with_a_factor_of_zero():
    scheduler = make_scheduler(groups_per_step=8, max_lag=4, fleet=FleetConfig(straggler_factor=0))
    version = start(scheduler)
    usual_rollouts(scheduler, version)
    slow, idle = join(scheduler, "slow"), join(scheduler, "idle")
    lease = acquire(scheduler, slow, version, num=1, now=2.0)[0]
    pass_time(scheduler, range(3, 60), {slow: {lease: 0.1}, idle: {}})
    assert not any(lease.rival for lease in acquire(scheduler, idle, version, now=60.0))


def test_what_the_learner_waits_for_gets_its_rival_sooner():
    scheduler = make_scheduler(groups_per_step=1, group_size=9, max_lag=0)
    version = start(scheduler)
    usual_rollouts(scheduler, version)
    slow, idle = join(scheduler, "slow"), join(scheduler, "idle")
    lease = acquire(scheduler, slow, version, num=1, now=2.0)[0]
    pass_time(scheduler, range(3, 9), {slow: {lease: 0.1}, idle: {}})
    assert not acquire(scheduler, idle, version, now=8.0)
    assert isinstance(scheduler.lineage.next_batch(version.epoch, 0), Waiting)
    pass_time(scheduler, range(9, 10), {slow: {lease: 0.1}, idle: {}})
    assert [lease.rival for lease in acquire(scheduler, idle, version, now=9.0)] == [True]


# -- groups past their deadline --------------------------------------------------------------


def one_missing(late_group: str, *, num_groups: int = 1, group_size: int = 3) -> tuple[Scheduler, Lease]:
    """All but one slot of all groups are filled; the learner waits, and the deadline passes."""
    fleet = FleetConfig(
        group_deadline_seconds=20.0,
        late_group=late_group,  # type: ignore[arg-type]
        straggler_factor=0,
        progress_timeout_seconds=500.0,
    )
    scheduler = make_scheduler(groups_per_step=num_groups, group_size=group_size, max_lag=0, fleet=fleet)
    version = start(scheduler)
    submit, slow = Submitter(scheduler, join(scheduler, "quick")), join(scheduler, "slow")
    scheduler.tick(0.0)
    missing = acquire(scheduler, slow, version, num=1)[0]
    for lease in acquire(scheduler, submit.session_id, version, num=1000):
        submit(make_message(lease, version))
    assert isinstance(scheduler.lineage.next_batch(version.epoch, 0), Waiting)
    pass_time(scheduler, range(1, 20), {slow: {missing: 1.0}, submit.session_id: {}})
    assert not _late(scheduler)
    pass_time(scheduler, range(20, 22), {slow: {missing: 1.0}, submit.session_id: {}})
    return scheduler, missing


def _late(scheduler: Scheduler) -> bool:
    records = scheduler.take_records()
    return any(
        isinstance(record, GroupDropped) or (isinstance(record, EventLogged) and record.kind == "late")
        for record in records
    )


def test_a_late_group_is_trained_partial():
    scheduler, missing = one_missing("partial")
    version = scheduler.version
    assert version is not None
    assert [r.lease_id for r in scheduler.take_revocations()] == [missing.lease_id]
    batch = scheduler.lineage.next_batch(version.epoch, 0)
    assert isinstance(batch, Batch)
    assert len(batch.groups[0].members) == 2
    late = Submitter(scheduler, join(scheduler, "late", now=22.0))
    assert late(make_message(missing, version), now=22.0).state is TrajectoryState.SURPLUS


def test_a_late_group_of_which_only_one_is_there_is_repaired_instead():
    scheduler, _missing = one_missing("partial", group_size=2)
    assert _late(scheduler)
    version = scheduler.version
    assert version is not None
    helper = Submitter(scheduler, join(scheduler, "helper", now=22.0))
    assert acquire(scheduler, helper.session_id, version, now=22.0)[0].rival


def test_a_late_group_is_repaired():
    scheduler, missing = one_missing("repair")
    version = scheduler.version
    assert version is not None
    helper = Submitter(scheduler, join(scheduler, "helper", now=22.0))
    again = acquire(scheduler, helper.session_id, version, now=22.0)
    assert [(lease.group_id, lease.slot, lease.rival) for lease in again] == [
        (missing.group_id, missing.slot, True)
    ]
    helper(make_message(again[0], version), now=22.0)
    batch = scheduler.lineage.next_batch(version.epoch, 0)
    assert isinstance(batch, Batch)
    assert len(batch.groups[0].members) == 3


def test_a_late_group_is_dropped_and_counted():
    scheduler, missing = one_missing("drop")
    dropped = [record for record in scheduler.take_records() if isinstance(record, GroupDropped)]
    assert [(record.group_id, record.state) for record in dropped] == [
        (missing.group_id, TrajectoryState.GROUP_DROPPED)
    ]
    version = scheduler.version
    assert version is not None
    helper = join(scheduler, "helper", now=22.0)
    assert {lease.group_id for lease in acquire(scheduler, helper, version, now=22.0)} == {1}


def test_a_group_that_nobody_waits_for_has_no_deadline():
    fleet = FleetConfig(group_deadline_seconds=5.0, late_group="drop")
    scheduler = make_scheduler(fleet=fleet)
    version = start(scheduler)
    session = join(scheduler)
    lease = acquire(scheduler, session, version, num=1)[0]
    pass_time(scheduler, range(1, 40), {session: {lease: 1.0}})
    assert lease.group_id in scheduler.groups


@pytest.mark.parametrize("late_group", ["partial", "repair", "drop"])
def test_a_missing_rollout_at_127_of_128_groups(late_group: str):
    """The step goes on, with each way of ending the group that misses it."""
    scheduler, _missing = one_missing(late_group, num_groups=128, group_size=4)
    version = scheduler.version
    assert version is not None
    helper = Submitter(scheduler, join(scheduler, "helper", now=22.0))
    for lease in acquire(scheduler, helper.session_id, version, num=1000, now=22.0):
        helper(make_message(lease, version), now=22.0)
    batch = scheduler.lineage.next_batch(version.epoch, 0)
    assert isinstance(batch, Batch)
    assert len(batch.groups) == 128
    num_members = sum(len(group.members) for group in batch.groups)
    assert num_members == 128 * 4 - (late_group == "partial")


def test_a_missing_rollout_at_127_of_128_groups_whose_actor_died():
    scheduler = make_scheduler(groups_per_step=128, group_size=2, max_lag=0)
    version = start(scheduler)
    submit, dead = Submitter(scheduler, join(scheduler, "quick")), join(scheduler, "dead")
    lost = acquire(scheduler, dead, version, num=1)[0]
    for lease in acquire(scheduler, submit.session_id, version, num=1000):
        submit(make_message(lease, version))
    granted_at = 0
    for now in range(1, 13):
        pass_time(scheduler, range(now, now + 1), {submit.session_id: {}})
        leases = acquire(scheduler, submit.session_id, version, now=float(now))
        if leases:
            granted_at = now
            submit(make_message(leases[0], version), now=float(now))
    assert 0 < granted_at <= 12
    batch = scheduler.lineage.next_batch(version.epoch, 0)
    assert isinstance(batch, Batch)
    assert batch.groups[lost.group_id].slots[lost.slot].filled is not None


def test_a_straggler_in_a_group_also_after_resume():
    """A resumed run waits for the one that was missing, and leases it again when its actor is gone."""
    before, missing = one_missing("repair")
    version = before.version
    assert version is not None
    group = before.groups[missing.group_id]
    after = make_scheduler(
        groups_per_step=1, group_size=3, max_lag=0, fleet=FleetConfig(group_deadline_seconds=20.0)
    )
    restored = Group(
        group_id=group.group_id,
        task=group.task,
        born=group.born,
        due=group.due,
        slots=group.slots,
    )
    for slot in restored.slots:
        slot.lease_ids = []
    after.restore(
        epoch=version.epoch,
        from_step=0,
        assigned=(),
        num_sessions=2,
        next_group_id=1,
        open_groups=[restored],
        live_leases=[(missing.group_id, missing.slot, missing.attempt)],
        versions=dict(before.lineage.versions),
        paused=False,
        now=100.0,
    )
    epoch = after.lineage.open(0, [])
    resumed = publish(after, PolicyVersion(epoch, 0))
    helper = Submitter(after, join(after, "helper", now=100.0))
    assert isinstance(after.lineage.next_batch(epoch, 0), Waiting)
    assert not acquire(after, helper.session_id, resumed, now=101.0), "its actor may still join again"
    pass_time(after, range(101, 112), {helper.session_id: {}})
    again = acquire(after, helper.session_id, resumed, now=112.0)
    assert [(lease.group_id, lease.slot) for lease in again] == [(missing.group_id, missing.slot)]
    helper(make_message(again[0], resumed), now=112.0)
    assert isinstance(after.lineage.next_batch(epoch, 0), Batch)


def test_max_lag_0_while_weights_are_in_transit():
    """No lease is granted under the old version, and none is lost: the actor that installs goes on."""
    scheduler = make_scheduler(groups_per_step=1, group_size=2, max_lag=0)
    old = start(scheduler)
    quick, slow = Submitter(scheduler, join(scheduler, "quick")), join(scheduler, "slow")
    for lease in acquire(scheduler, quick.session_id, old):
        quick(make_message(lease, old))
    assert isinstance(scheduler.lineage.next_batch(old.epoch, 0), Batch)
    new = publish(scheduler, PolicyVersion(old.epoch, 1))
    leases, reason = scheduler.acquire(slow, old, digest_of(old), 8, 1.0)
    assert not leases
    assert "too old to be trained within max_lag 0" in reason
    granted = acquire(scheduler, quick.session_id, new, now=1.0)
    assert len(granted) == 2
    quick.release(granted[0], outcome=_drained(), now=1.0)
    assert not acquire(scheduler, slow, old, now=1.0), "a free slot of the new version is not for the old one"
    for lease in [*acquire(scheduler, slow, new, now=2.0), granted[1]]:
        quick(make_message(lease, new), now=2.0)
    assert isinstance(scheduler.lineage.next_batch(new.epoch, 1), Batch)


def test_the_usual_duration_grows_with_the_tokens_but_is_never_below_the_usual_length():
    pace = Pace()
    for _ in range(8):
        pace.finished("words", 10.0, 100)
    assert pace.usual_seconds("words", 1) is None, "not computed yet"
    pace.refresh()
    assert pace.usual_seconds("words", 1) == pytest.approx(10.0)
    assert pace.usual_seconds("words", 1000) == pytest.approx(100.0)
    assert pace.usual_seconds("others", 1) is None


def _stats():  # type: ignore[no-untyped-def]
    from learner.coordinator.fleet import ReportedStats

    return ReportedStats()


def _drained():  # type: ignore[no-untyped-def]
    from learner.coordinator.groups import LeaseOutcome

    return LeaseOutcome.DRAINED


def test_what_actors_bring_back_when_they_join_again_says_nothing_of_the_usual_pace() -> None:
    scheduler = make_scheduler(groups_per_step=8, max_lag=4)
    version = start(scheduler)
    before = join(scheduler, "spooling")
    played = acquire(scheduler, before, version, num=8)
    held = tuple(lease.lease_id for lease in played)
    spooling = Submitter(scheduler, join(scheduler, "spooling", held=held, now=60.0))
    slow, fast = (Submitter(scheduler, join(scheduler, name, now=60.0)) for name in ("slow", "fast"))
    straggler = acquire(scheduler, slow.session_id, version, num=1, now=60.0)[0]
    for lease in played:
        assert spooling(make_message(lease, version), now=60.01).state is TrajectoryState.PENDING
    pass_time(scheduler, range(61, 80), {slow.session_id: {straggler: 0.5}, fast.session_id: {}})
    assert not any(lease.rival for lease in acquire(scheduler, fast.session_id, version, num=8, now=80.0)), (
        "a rollout that took a minute looks as if it had taken ten milliseconds"
    )
