import pytest

from learner.config import FleetConfig
from learner.coordinator.decisions import Batch, Waiting
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.leases import RolloutReport
from learner.coordinator.records import BatchTrained, GroupDropped, LeaseEnded, TrajectoryState
from learner.coordinator.validation import RejectionCode
from penstock.errors import PeerLost, ProtocolError, SequenceGap, SessionFenced
from penstock.trajectory import PolicyVersion, VersionSpan

from .fakes import Submitter, acquire, join, make_message, make_scheduler, publish, read, start


def test_a_step_goes_from_lease_to_trained():
    scheduler = make_scheduler()
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    for lease in acquire(scheduler, submit.session_id, version, num=4):
        assert submit(make_message(lease, version)).state is TrajectoryState.PENDING
    batch = scheduler.lineage.next_batch(version.epoch, step=0)
    assert isinstance(batch, Batch)
    assert [group.group_id for group in batch.groups] == [0, 1]
    publish(scheduler, PolicyVersion(version.epoch, 1))
    assert BatchTrained(step=0, group_ids=(0, 1)) in scheduler.take_records()
    assert not scheduler.groups


def test_every_rank_gets_the_same_batch():
    scheduler = make_scheduler(groups_per_step=1)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    for lease in acquire(scheduler, submit.session_id, version):
        submit(make_message(lease, version))
    first = scheduler.lineage.next_batch(version.epoch, step=0)
    assert scheduler.lineage.next_batch(version.epoch, step=0) is first


def test_no_lease_is_granted_before_a_version_is_published():
    scheduler = make_scheduler()
    session = join(scheduler)
    version = PolicyVersion(1, 0)
    assert scheduler.acquire(session, version, "x", 1, 0.0) == ([], "no version is published yet")


def test_no_lease_is_granted_for_a_digest_that_was_not_published():
    scheduler = make_scheduler()
    version = start(scheduler)
    leases, reason = scheduler.acquire(join(scheduler), version, "another digest", 1, 0.0)
    assert not leases
    assert "never published" in reason


def test_groups_ever_leased_stay_within_the_bound():
    scheduler = make_scheduler(groups_per_step=2, group_size=2, max_lag=1)
    version = start(scheduler)
    leases = acquire(scheduler, join(scheduler), version, num=100)
    assert len({lease.group_id for lease in leases}) == (1 + 0 + 1) * 2


def test_max_lag_zero_leases_the_next_groups_only_after_the_step():
    scheduler = make_scheduler(groups_per_step=1, max_lag=0)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    for lease in acquire(scheduler, submit.session_id, version):
        submit(make_message(lease, version))
    assert not acquire(scheduler, submit.session_id, version)
    scheduler.lineage.next_batch(version.epoch, step=0)
    assert not acquire(scheduler, submit.session_id, version)
    new = publish(scheduler, PolicyVersion(version.epoch, 1))
    assert not acquire(scheduler, submit.session_id, version), "the old version would be trained with lag 1"
    assert len(acquire(scheduler, submit.session_id, new)) == 2


def test_a_step_waits_for_an_unfinished_group_that_would_be_trained_too_late():
    scheduler = make_scheduler(groups_per_step=1, group_size=2, max_lag=2)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    leases = acquire(scheduler, submit.session_id, version)
    of_group = {group: [lease for lease in leases if lease.group_id == group] for group in range(3)}
    for lease in of_group[2]:
        submit(make_message(lease, version))
    assert isinstance(scheduler.lineage.next_batch(version.epoch, 0), Batch), (
        "two steps are left for two groups"
    )
    second = publish(scheduler, PolicyVersion(version.epoch, 1))
    for lease in acquire(scheduler, submit.session_id, second):
        submit(make_message(lease, second))
    waiting = scheduler.lineage.next_batch(version.epoch, 1)
    assert isinstance(waiting, Waiting), "group 3 is ready, but then group 0 or 1 would be trained with lag 3"
    assert [group.group_id for group in waiting.groups] == [0, 1]
    for lease in of_group[0]:
        submit(make_message(lease, version))
    batch = scheduler.lineage.next_batch(version.epoch, 1)
    assert isinstance(batch, Batch)
    assert batch.groups[0].group_id == 0


def test_the_last_steps_lease_no_more_than_they_train():
    scheduler = make_scheduler(num_steps=1, groups_per_step=2, max_lag=4)
    version = start(scheduler)
    leases = acquire(scheduler, join(scheduler), version)
    assert len({lease.group_id for lease in leases}) == 2


def test_a_silent_actor_is_declared_dead_and_its_leases_granted_again():
    scheduler = make_scheduler()
    version = start(scheduler)
    dead, alive = join(scheduler, "dead"), join(scheduler, "alive")
    lost = acquire(scheduler, dead, version, num=1)[0]
    for now in range(1, 11):
        scheduler.tick(float(now))
        scheduler.fleet.require(alive, float(now))
    again = acquire(scheduler, alive, version, num=1, now=11.0)[0]
    assert (again.group_id, again.slot, again.attempt) == (lost.group_id, lost.slot, 1)
    assert again.task == lost.task
    with pytest.raises(PeerLost):
        scheduler.fleet.require(dead, 11.0)


def test_the_first_result_of_a_slot_wins_and_the_other_is_surplus():
    scheduler = make_scheduler(fleet=FleetConfig(progress_timeout_seconds=5.0))
    version = start(scheduler)
    slow, fast = Submitter(scheduler, join(scheduler, "slow")), Submitter(scheduler, join(scheduler, "fast"))
    first = acquire(scheduler, slow.session_id, version, num=1)[0]
    for now in range(1, 7):
        scheduler.fleet.require(slow.session_id, float(now))
        scheduler.fleet.require(fast.session_id, float(now))
        scheduler.tick(float(now))
    assert [revocation.lease_id for revocation in scheduler.take_revocations()] == [first.lease_id]
    second = acquire(scheduler, fast.session_id, version, num=1, now=7.0)[0]
    assert slow(make_message(first, version)).state is TrajectoryState.PENDING
    assert [revocation.session_id for revocation in scheduler.take_revocations()] == [fast.session_id]
    assert fast(make_message(second, version)).state is TrajectoryState.SURPLUS


def test_a_trajectory_sent_twice_is_stored_once():
    scheduler = make_scheduler()
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    message = make_message(acquire(scheduler, submit.session_id, version, num=1)[0], version)
    assert submit(message).state is TrajectoryState.PENDING
    assert submit(message).is_duplicate
    other = Submitter(scheduler, join(scheduler, "b"))
    assert other(message).is_duplicate


def test_an_id_that_comes_again_under_the_lease_of_another_group_is_a_duplicate():
    scheduler = make_scheduler(group_size=2, groups_per_step=2)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    first, _, second = acquire(scheduler, submit.session_id, version, num=3)
    assert first.group_id != second.group_id
    assert submit(make_message(first, version, trajectory_id="ab" * 16)).state is TrajectoryState.PENDING
    assert submit(make_message(second, version, trajectory_id="ab" * 16)).is_duplicate


def test_an_item_that_was_decided_upon_is_acknowledged_again_and_not_decided_again():
    scheduler = make_scheduler()
    version = start(scheduler)
    session = join(scheduler)
    message = make_message(acquire(scheduler, session, version, num=1)[0], version)
    assert scheduler.docket.submit(session, 1, read(message), 0.0).state is TrajectoryState.PENDING
    assert scheduler.docket.submit(session, 1, read(message), 0.0).is_duplicate


def test_a_gap_in_the_sequence_is_refused():
    scheduler = make_scheduler()
    version = start(scheduler)
    session = join(scheduler)
    message = make_message(acquire(scheduler, session, version, num=1)[0], version)
    with pytest.raises(SequenceGap, match="send again from 1"):
        scheduler.docket.submit(session, 2, read(message), 0.0)


def test_a_newer_session_of_an_actor_fences_the_older_one():
    scheduler = make_scheduler()
    version = start(scheduler)
    old = join(scheduler, "a")
    kept, lost = acquire(scheduler, old, version, num=2)
    new = join(scheduler, "a", held=(kept.lease_id,))
    with pytest.raises(SessionFenced, match="was replaced by"):
        scheduler.fleet.require(old, 0.0)
    assert [lease.lease_id for lease in scheduler.leases.of_session(new)] == [kept.lease_id]
    assert acquire(scheduler, new, version, num=1)[0].slot == lost.slot


def test_a_lease_that_the_actor_never_received_is_granted_again():
    scheduler = make_scheduler()
    version = start(scheduler)
    session = join(scheduler)
    lost = acquire(scheduler, session, version, num=1)[0]
    scheduler.heartbeat(session, installed=version, stats=_stats(), progress=[], now=1.0)
    assert scheduler.leases.get(lost.lease_id) is not None, "the answer may still be on its way"
    scheduler.heartbeat(session, installed=version, stats=_stats(), progress=[], now=7.0)
    assert scheduler.leases.get(lost.lease_id) is None


def test_progress_extends_a_lease_and_a_heartbeat_alone_does_not():
    scheduler = make_scheduler(fleet=FleetConfig(progress_timeout_seconds=5.0))
    version = start(scheduler)
    session = join(scheduler)
    moving, stuck = acquire(scheduler, session, version, num=2)
    for now in range(1, 9):
        progress = [RolloutReport(moving.lease_id, now, 0), RolloutReport(stuck.lease_id, 0, 0)]
        scheduler.heartbeat(session, installed=version, stats=_stats(), progress=progress, now=float(now))
        scheduler.tick(float(now))
    assert scheduler.leases.get(moving.lease_id) is not None
    assert scheduler.leases.get(stuck.lease_id) is None


def test_a_pause_of_the_learner_itself_costs_nobody_a_lease():
    scheduler = make_scheduler()
    version = start(scheduler)
    session = join(scheduler)
    lease = acquire(scheduler, session, version, num=1)[0]
    scheduler.tick(1.0)
    scheduler.tick(500.0)
    assert scheduler.leases.get(lease.lease_id) is not None
    assert scheduler.fleet.find(session) is not None


def test_a_slot_is_given_up_after_its_budget_and_the_rest_of_the_group_is_trained():
    scheduler = make_scheduler(groups_per_step=1, group_size=3, max_lag=0)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    good, also_good, bad = acquire(scheduler, submit.session_id, version, num=3)
    submit(make_message(good, version))
    submit(make_message(also_good, version))
    submit.release(bad, LeaseOutcome.DATA, "the task is broken")
    again = acquire(scheduler, submit.session_id, version, num=1)[0]
    submit.release(again, LeaseOutcome.DATA, "the task is broken")
    batch = scheduler.lineage.next_batch(version.epoch, 0)
    assert isinstance(batch, Batch)
    assert len(batch.groups[0].members) == 2


def test_a_group_without_two_trajectories_is_dropped_and_counted():
    scheduler = make_scheduler(groups_per_step=1, group_size=2, fleet=FleetConfig(data_budget=1))
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    good, bad = acquire(scheduler, submit.session_id, version, num=2)
    submit(make_message(good, version))
    submit.release(bad, LeaseOutcome.DATA, "broken")
    dropped = [record for record in scheduler.take_records() if isinstance(record, GroupDropped)]
    assert [(record.group_id, record.state) for record in dropped] == [(0, TrajectoryState.GROUP_DROPPED)]
    assert acquire(scheduler, submit.session_id, version, num=1)[0].group_id == 1, "another takes its place"


def test_a_draining_actor_uses_up_no_budget():
    scheduler = make_scheduler(fleet=FleetConfig(infrastructure_budget=1, data_budget=1))
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    for _ in range(5):
        lease = acquire(scheduler, submit.session_id, version, num=1)[0]
        submit.release(lease, LeaseOutcome.DRAINED)
        assert (lease.group_id, lease.slot) == (0, 0)


def test_a_prompt_that_saw_three_actors_die_is_quarantined():
    scheduler = make_scheduler(groups_per_step=1)
    version = start(scheduler)
    for death in range(3):
        session = join(scheduler, f"victim-{death}")
        assert acquire(scheduler, session, version, num=1)[0].group_id == 0
        scheduler.fleet.shift(-100.0, 0.0)
        scheduler.tick(float(death))
    dropped = [record for record in scheduler.take_records() if isinstance(record, GroupDropped)]
    assert [(record.group_id, record.state) for record in dropped] == [(0, TrajectoryState.QUARANTINED)]


def test_a_skipped_step_quarantines_its_batch_and_makes_another():
    scheduler = make_scheduler(groups_per_step=1, max_lag=1)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    for lease in acquire(scheduler, submit.session_id, version):
        submit(make_message(lease, version))
    poisoned = scheduler.lineage.next_batch(version.epoch, 0)
    scheduler.lineage.skip(version.epoch, 0, "the loss is nan")
    batch = scheduler.lineage.next_batch(version.epoch, 0)
    assert isinstance(poisoned, Batch)
    assert isinstance(batch, Batch)
    assert batch.groups[0].group_id != poisoned.groups[0].group_id


def test_what_comes_late_for_a_quarantined_group_is_quarantined_too():
    scheduler = make_scheduler(groups_per_step=1, group_size=2)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    leases = acquire(scheduler, submit.session_id, version, 2)
    for lease in leases:
        submit(make_message(lease, version))
    scheduler.lineage.next_batch(version.epoch, 0)
    scheduler.lineage.skip(version.epoch, 0, "the loss is nan")
    late = submit(make_message(leases[0], version))
    assert late.state is TrajectoryState.QUARANTINED


def test_a_newer_trainer_fences_the_older_one():
    scheduler = make_scheduler()
    old = start(scheduler)
    start(scheduler)
    with pytest.raises(SessionFenced):
        scheduler.lineage.next_batch(old.epoch, 0)
    with pytest.raises(SessionFenced):
        publish(scheduler, PolicyVersion(old.epoch, 1))


def test_a_version_has_one_digest():
    scheduler = make_scheduler()
    version = start(scheduler)
    with pytest.raises(ProtocolError, match="digest"):
        scheduler.lineage.published(version, "another", b"", "{}")


def test_what_was_trained_after_the_checkpoint_is_trained_again():
    scheduler = make_scheduler(groups_per_step=1, max_lag=1)
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    for lease in acquire(scheduler, submit.session_id, version):
        submit(make_message(lease, version))
    batch = scheduler.lineage.next_batch(version.epoch, 0)
    assert isinstance(batch, Batch)
    publish(scheduler, PolicyVersion(version.epoch, 1))
    epoch = scheduler.lineage.open(0, list(batch.groups))
    publish(scheduler, PolicyVersion(epoch, 0))
    again = scheduler.lineage.next_batch(epoch, 0)
    assert isinstance(again, Batch)
    assert again.groups[0].group_id == batch.groups[0].group_id


def test_no_lease_is_granted_while_paused():
    scheduler = make_scheduler()
    version = start(scheduler)
    session = join(scheduler)
    scheduler.set_paused(True)
    assert not acquire(scheduler, session, version)
    scheduler.set_paused(False)
    assert acquire(scheduler, session, version)


def test_leaving_returns_leases_at_once():
    scheduler = make_scheduler()
    version = start(scheduler)
    leaving, staying = join(scheduler, "leaving"), join(scheduler, "staying")
    lease = acquire(scheduler, leaving, version, num=1)[0]
    scheduler.leave(leaving, "SIGTERM", 0.0)
    ended = [record for record in scheduler.take_records() if isinstance(record, LeaseEnded)]
    assert ended == [LeaseEnded(lease.group_id, lease.slot, lease.attempt, LeaseOutcome.DRAINED, "SIGTERM")]
    assert acquire(scheduler, staying, version, num=1)[0].slot == lease.slot


def test_a_trajectory_that_began_before_its_group_is_stale():
    scheduler = make_scheduler(groups_per_step=1, max_lag=4)
    first = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    for lease in acquire(scheduler, submit.session_id, first):
        submit(make_message(lease, first))
    scheduler.lineage.next_batch(first.epoch, 0)
    second = publish(scheduler, PolicyVersion(first.epoch, 1))
    lease = acquire(scheduler, submit.session_id, second, num=1)[0]
    verdict = submit(make_message(lease, first))
    assert verdict.state is TrajectoryState.STALE
    assert acquire(scheduler, submit.session_id, second, num=1)[0].slot == lease.slot, (
        "the slot is free again"
    )


def test_siblings_with_another_observation_are_rejected():
    scheduler = make_scheduler()
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    first, second = acquire(scheduler, submit.session_id, version, num=2)
    submit(make_message(first, version))
    verdict = submit(make_message(second, version, observation_digest="other"))
    assert verdict.code is RejectionCode.OBSERVATION_DIFFERS


def test_an_unknown_lease_is_rejected():
    scheduler = make_scheduler()
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    lease = acquire(scheduler, submit.session_id, version, num=1)[0]
    for forged in ("", "7.0.0", "0.0.1", "0.9.0", "x.y.z", "-1.0.0", "0.0.0.0", "\u0663.\u0660.\u0660"):
        assert submit(make_message(lease, version, lease_id=forged)).code is RejectionCode.UNKNOWN_LEASE
    assert submit(make_message(lease, version)).state is TrajectoryState.PENDING


def test_a_rejected_trajectory_frees_its_slot_and_a_slot_with_too_many_of_them_is_given_up():
    scheduler = make_scheduler(groups_per_step=1, group_size=3, fleet=FleetConfig(infrastructure_budget=2))
    version = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    first, *others = acquire(scheduler, submit.session_id, version)
    for lease in others:
        submit(make_message(lease, version))
    unknown = (VersionSpan(PolicyVersion(1, 9), 3),)
    assert submit(make_message(first, version, versions=unknown)).code is RejectionCode.UNKNOWN_VERSION

    again = acquire(scheduler, submit.session_id, version, num=1)[0]

    assert (again.group_id, again.slot) == (first.group_id, first.slot)
    submit(make_message(again, version, versions=unknown))
    assert not acquire(scheduler, submit.session_id, version, num=1)
    batch = scheduler.lineage.next_batch(version.epoch, 0)
    assert batch is not None
    assert list(batch.group_ids) == [first.group_id], "it is trained with the others"


def test_mixed_versions_are_accepted_in_order_only():
    scheduler = make_scheduler(groups_per_step=1)
    first = start(scheduler)
    submit = Submitter(scheduler, join(scheduler))
    leases = acquire(scheduler, submit.session_id, first)
    for lease in leases[:2]:
        submit(make_message(lease, first))
    scheduler.lineage.next_batch(first.epoch, 0)
    second = publish(scheduler, PolicyVersion(first.epoch, 1))
    forwards = (VersionSpan(first, 1), VersionSpan(second, 2))
    assert submit(make_message(leases[2], first, versions=forwards)).state is TrajectoryState.PENDING
    backwards = (VersionSpan(second, 1), VersionSpan(first, 2))
    verdict = submit(make_message(leases[3], first, versions=backwards))
    assert verdict.code is RejectionCode.BAD_VERSIONS


def _stats():  # type: ignore[no-untyped-def]
    from learner.coordinator.fleet import ReportedStats

    return ReportedStats()
