from __future__ import annotations

import json
from collections import Counter

import pytest

from learner.config import FleetConfig
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.coordinator.evaluation.evaluation import Evaluation
from learner.coordinator.evaluation.history import RecoveredEvaluation, RecoveredEvaluations, RecoveredSlot
from learner.coordinator.evaluation.plan import EvaluationSource, Plan
from learner.coordinator.evaluation.records import EvaluationAnswered, EvaluationEnded, EvaluationState
from learner.coordinator.evaluation.result import EvaluationResult
from learner.coordinator.fleet import ActorInfo, ReportedStats
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.records import EventLogged
from learner.coordinator.scheduler import Scheduler
from learner.coordinator.validation import RejectionCode
from penstock.errors import ConfigError
from penstock.scores import Answer
from penstock.trajectory import FinishReason, Lease, PolicyVersion, Reward, VersionSpan

from .fakes import (
    ENVIRONMENT,
    Submitter,
    acquire,
    join,
    make_message,
    make_scheduler,
    publish,
    start,
)

CONFIG = EvaluationConfig(every_steps=2, num_prompts=3, deadline_seconds=100.0)


def plan_of(config: EvaluationConfig) -> Plan:
    return Plan(
        [EvaluationSource(environment=ENVIRONMENT, num_prompts=config.num_prompts)],
        samples=config.samples_per_prompt,
        seed=config.seed,
        sampling=config.sampling(16),
    )


def evaluating(config: EvaluationConfig = CONFIG, **schedule: int) -> Scheduler:
    """A scheduler that evaluates, with its first version published, which is due."""
    scheduler = make_scheduler(evaluation=config, plan=plan_of(config), **schedule)
    start(scheduler)
    return scheduler


def pinned(leases: list[Lease]) -> list[Lease]:
    return [lease for lease in leases if lease.pin is not None]


def answer_all(submit: Submitter, leases: list[Lease], version: PolicyVersion, *, now: float = 0.0) -> None:
    for lease in pinned(leases):
        submit(make_message(lease, version), now=now)


def train(scheduler: Scheduler, submit: Submitter, version: PolicyVersion) -> PolicyVersion:
    """One step on what this actor plays, up to the next version."""
    for lease in acquire(scheduler, submit.session_id, version):
        if lease.pin is None:
            submit(make_message(lease, version))
    scheduler.lineage.next_batch(version.epoch, version.step)
    return publish(scheduler, PolicyVersion(version.epoch, version.step + 1))


def events(scheduler: Scheduler) -> str:
    return "\n".join(r.message for r in scheduler.take_records() if isinstance(r, EventLogged))


def test_a_version_that_is_due_is_evaluated_by_those_who_have_it():
    scheduler = evaluating()
    version = PolicyVersion(1, 0)
    submit = Submitter(scheduler, join(scheduler))
    leases = pinned(acquire(scheduler, submit.session_id, version))
    assert [(lease.task.split, lease.task.index) for lease in leases] == [
        ("eval", 0),
        ("eval", 1),
        ("eval", 2),
    ]
    assert {lease.pin.version for lease in leases if lease.pin} == {version}
    answer_all(submit, leases, version)
    (result,) = scheduler.evaluations.take_ended()
    assert (result.version, result.state, result.num_answers) == (version, EvaluationState.COMPLETE, 3)
    assert result.mean is not None
    assert result.mean.reward_mean == 1.0


def test_what_an_evaluation_leaves_of_an_actor_trains():
    scheduler = evaluating()
    leases = acquire(scheduler, join(scheduler), PolicyVersion(1, 0), 6)
    assert (len(pinned(leases)), len(leases)) == (3, 6)


def test_answers_are_no_trajectories_of_training():
    scheduler = evaluating()
    submit = Submitter(scheduler, join(scheduler))
    leases = acquire(scheduler, submit.session_id, PolicyVersion(1, 0))
    scheduler.take_records()
    answer_all(submit, leases, PolicyVersion(1, 0))
    kinds = [type(record).__name__ for record in scheduler.take_records()]
    assert kinds.count("EvaluationAnswered") == 3
    assert "TrajectoryStored" not in kinds


def test_tokens_of_another_version_are_refused_and_the_question_is_asked_again():
    scheduler = evaluating()
    submit = Submitter(scheduler, join(scheduler))
    lease = pinned(acquire(scheduler, submit.session_id, PolicyVersion(1, 0)))[0]
    mixed = (VersionSpan(PolicyVersion(1, 0), 2), VersionSpan(PolicyVersion(1, 1), 1))
    assert (
        submit(make_message(lease, PolicyVersion(1, 0), versions=mixed)).code is RejectionCode.WRONG_VERSION
    )
    again = pinned(acquire(scheduler, submit.session_id, PolicyVersion(1, 0)))
    assert [(each.slot, each.attempt) for each in again] == [(lease.slot, 1)]


def test_every_version_is_asked_the_same_under_the_same_seeds():
    config = EvaluationConfig(every_steps=1, num_prompts=2, samples_per_prompt=2)
    scheduler = evaluating(config)
    submit = Submitter(scheduler, join(scheduler))
    asked = []
    for step in range(2):
        version = PolicyVersion(1, step)
        leases = pinned(acquire(scheduler, submit.session_id, version, 4))
        asked.append([(lease.task, lease.sampling) for lease in leases])
        answer_all(submit, leases, version)
        train(scheduler, submit, version)
    assert asked[0] == asked[1]
    assert len({sampling.seed for _, sampling in asked[0]}) == 4


def test_an_actor_that_went_on_gets_no_lease_of_the_version_it_left():
    scheduler = evaluating()
    submit = Submitter(scheduler, join(scheduler))
    version = train(scheduler, submit, PolicyVersion(1, 0))
    assert version.step == 1
    assert not pinned(acquire(scheduler, join(scheduler, "b"), version))


def test_only_a_share_of_the_fleet_holds_the_version():
    scheduler = evaluating(EvaluationConfig(every_steps=2, num_prompts=64, fleet_share=0.5))
    sessions = [join(scheduler, name) for name in "abcd"]
    got = [len(pinned(acquire(scheduler, session, PolicyVersion(1, 0), 10))) for session in sessions]
    assert got == [10, 6, 0, 0], "half of four actors, and half of their 32 slots"
    assert [scheduler.evaluations.held_by(session) is not None for session in sessions] == [
        True,
        True,
        False,
        False,
    ]


def test_an_actor_that_has_the_version_takes_the_place_of_one_that_does_not_come_to_it():
    scheduler = evaluating(max_lag=4)
    slow, quick = join(scheduler, "slow"), join(scheduler, "quick")
    for session in (slow, quick):
        acquire(scheduler, session, PolicyVersion(1, 0), 1)
    scheduler.evaluations.lineage_opened()
    scheduler.evaluations.published(PolicyVersion(1, 2), "two", 1.0)
    assert scheduler.evaluations.held_by(slow) == PolicyVersion(1, 2)
    scheduler.lineage.versions[PolicyVersion(1, 2)] = "two"
    leases, _ = scheduler.acquire(quick, PolicyVersion(1, 2), "two", 3, 1.0)
    assert len(pinned(leases)) == 3
    assert scheduler.evaluations.held_by(slow) is None


def test_a_lone_actor_that_training_refuses_works_on_the_evaluation_with_all_it_has():
    config = EvaluationConfig(every_steps=2, num_prompts=8, fleet_share=0.5)
    scheduler = evaluating(config, max_lag=0)
    submit = Submitter(scheduler, join(scheduler))
    leases = acquire(scheduler, submit.session_id, PolicyVersion(1, 0), 8)
    assert len(pinned(leases)) == 4
    for lease in leases:
        if lease.pin is None:
            submit(make_message(lease, PolicyVersion(1, 0)))
    scheduler.lineage.next_batch(1, 0)
    publish(scheduler, PolicyVersion(1, 1))
    assert len(pinned(acquire(scheduler, submit.session_id, PolicyVersion(1, 0), 8))) == 4


def test_a_death_gives_the_questions_to_another_holder():
    scheduler = evaluating()
    first, second = join(scheduler, "a"), join(scheduler, "b")
    leases = pinned(acquire(scheduler, first, PolicyVersion(1, 0)))
    scheduler.heartbeat(second, installed=PolicyVersion(1, 0), stats=ReportedStats(), progress=[], now=9.0)
    scheduler.tick(10.5)
    again = pinned(acquire(scheduler, second, PolicyVersion(1, 0), now=10.5))
    assert [lease.slot for lease in again] == [lease.slot for lease in leases]
    assert {lease.attempt for lease in again} == {1}


def test_of_two_answers_to_one_question_the_first_counts_and_the_other_is_surplus():
    scheduler = evaluating(EvaluationConfig(every_steps=2, num_prompts=3, fleet_share=1.0))
    slow, quick = (Submitter(scheduler, join(scheduler, name)) for name in "ab")
    (lease, *_) = pinned(acquire(scheduler, slow.session_id, PolicyVersion(1, 0)))
    slow.release(lease, LeaseOutcome.DRAINED)
    (again,) = pinned(acquire(scheduler, quick.session_id, PolicyVersion(1, 0)))
    assert slow(make_message(lease, PolicyVersion(1, 0))).state == "pending"
    assert [r.lease_id for r in scheduler.take_revocations()] == [again.lease_id]
    assert quick(make_message(again, PolicyVersion(1, 0))).state == "surplus"
    assert scheduler.evaluations.open is not None
    assert scheduler.evaluations.open.num_answers == 1


def test_an_actor_turns_back_if_nobody_has_the_version_any_more():
    scheduler = evaluating(max_lag=4)
    holder = Submitter(scheduler, join(scheduler, "a"))
    version = train(scheduler, holder, PolicyVersion(1, 0))
    other = join(scheduler, "b")
    acquire(scheduler, other, version, 1)
    scheduler.tick(0.5)
    assert scheduler.evaluations.held_by(other) is None, "one has it still"
    scheduler.leave(holder.session_id, "", 1.0)
    scheduler.tick(1.5)
    assert scheduler.evaluations.held_by(other) == PolicyVersion(1, 0)


def test_an_evaluation_begins_again_with_a_newer_version_if_its_own_cannot_be_had():
    scheduler = evaluating(max_lag=4)
    scheduler.evaluations.is_held = lambda version: False
    holder = Submitter(scheduler, join(scheduler, "a"))
    version = train(scheduler, holder, PolicyVersion(1, 0))
    other = join(scheduler, "b")
    acquire(scheduler, other, version, 1)
    scheduler.leave(holder.session_id, "", 1.0)
    scheduler.tick(1.5)
    assert scheduler.evaluations.open is not None
    assert scheduler.evaluations.open.version == version
    assert "begins again with a newer one" in events(scheduler)


def test_a_deadline_ends_it_with_what_is_there():
    scheduler = evaluating()
    submit = Submitter(scheduler, join(scheduler))
    leases = pinned(acquire(scheduler, submit.session_id, PolicyVersion(1, 0)))
    submit(make_message(leases[0], PolicyVersion(1, 0)))
    scheduler.tick(0.0)
    scheduler.evaluations.tick(100.0)
    (result,) = scheduler.evaluations.take_ended()
    assert (result.state, result.num_answers, result.num_missing) == (EvaluationState.DEADLINE, 1, 2)
    assert {r.lease_id for r in scheduler.take_revocations()} >= {lease.lease_id for lease in leases[1:]}
    late = submit(make_message(leases[1], PolicyVersion(1, 0)))
    assert late.code is RejectionCode.UNKNOWN_LEASE, "this history knows nothing"


def test_before_the_first_actor_joins_a_deadline_draws_no_nearer_for_a_while():
    scheduler = evaluating()
    for now in (50.0, 99.0):
        scheduler.evaluations.tick(now)
    join(scheduler, now=99.0)
    scheduler.evaluations.tick(198.0)
    assert scheduler.evaluations.open is not None
    scheduler.evaluations.tick(199.0)
    assert scheduler.evaluations.open is None
    alone = evaluating()
    for now in range(0, 200, 50):
        alone.evaluations.tick(float(now))
    assert alone.evaluations.open is not None
    alone.evaluations.tick(200.0)
    assert alone.evaluations.open is None


def test_faults_are_counted_apart_until_a_budget_gives_the_question_up():
    scheduler = evaluating()
    submit = Submitter(scheduler, join(scheduler))
    leases = pinned(acquire(scheduler, submit.session_id, PolicyVersion(1, 0)))
    submit.release(leases[0], LeaseOutcome.DATA, "broken")
    (again,) = pinned(acquire(scheduler, submit.session_id, PolicyVersion(1, 0)))
    submit.release(again, LeaseOutcome.DATA, "broken")
    answer_all(submit, leases[1:], PolicyVersion(1, 0))
    (result,) = scheduler.evaluations.take_ended()
    assert (result.num_answers, result.num_missing, result.faults) == (2, 0, {"data: broken": 1})
    assert result.mean is not None
    assert result.mean.reward_mean == 1.0


def test_a_version_that_is_due_while_another_is_open_is_followed_by_the_newest():
    scheduler = evaluating(EvaluationConfig(every_steps=1, num_prompts=3), max_lag=4)
    submit = Submitter(scheduler, join(scheduler))
    leases = acquire(scheduler, submit.session_id, PolicyVersion(1, 0), 3)
    version = PolicyVersion(1, 0)
    for _ in range(3):
        version = train(scheduler, submit, version)
    answer_all(submit, leases, PolicyVersion(1, 0))
    assert scheduler.evaluations.open is not None
    assert scheduler.evaluations.open.version == version == PolicyVersion(1, 3)


def test_tensors_that_have_a_result_are_not_evaluated_again():
    scheduler = evaluating()
    submit = Submitter(scheduler, join(scheduler))
    answer_all(submit, acquire(scheduler, submit.session_id, PolicyVersion(1, 0)), PolicyVersion(1, 0))
    start(scheduler)
    assert scheduler.evaluations.open is None


def test_a_trainer_that_starts_anew_makes_an_open_evaluation_begin_again():
    scheduler = evaluating()
    start(scheduler)
    assert scheduler.evaluations.open is not None
    assert scheduler.evaluations.open.version == PolicyVersion(2, 0)


def test_an_open_evaluation_goes_on_after_a_restart_unless_its_settings_changed():
    found = RecoveredEvaluations(
        next_number=2,
        open=RecoveredEvaluation(
            number=1,
            version=PolicyVersion(1, 0),
            digest="d",
            plan=plan_of(CONFIG).describe(),
            slots={
                0: RecoveredSlot(
                    next_attempt=1, answer=Answer(prompt=0, reward=1.0, num_tokens=1, truncated=False)
                )
            },
        ),
    )
    scheduler = make_scheduler(evaluation=CONFIG, plan=plan_of(CONFIG))
    scheduler.evaluations.restore(found, 0.0)
    assert scheduler.evaluations.open is not None
    assert scheduler.evaluations.open.num_answers == 1
    changed = EvaluationConfig(every_steps=2, num_prompts=2)
    other = make_scheduler(evaluation=changed, plan=plan_of(changed))
    other.evaluations.restore(found, 0.0)
    assert other.evaluations.open is None
    assert [r.state for r in other.take_records() if isinstance(r, EvaluationEnded)] == [EvaluationState.VOID]


def test_after_a_restart_actors_that_have_the_version_are_given_time_to_join():
    found = RecoveredEvaluations(
        next_number=2,
        open=RecoveredEvaluation(
            number=1, version=PolicyVersion(1, 0), digest="d", plan=plan_of(CONFIG).describe(), slots={}
        ),
    )
    scheduler = make_scheduler(evaluation=CONFIG, plan=plan_of(CONFIG))
    scheduler.evaluations.is_held = lambda version: False
    scheduler.evaluations.restore(found, 0.0)
    scheduler.evaluations.resume(PolicyVersion(1, 3), "newest", 0.0)
    newer = ActorInfo(actor_id="b", engine="fake", num_slots=8)
    scheduler.join("b", newer, (), 0.5, installed=PolicyVersion(1, 3))
    scheduler.evaluations.tick(1.0)
    assert scheduler.evaluations.open is not None
    older = ActorInfo(actor_id="a", engine="fake", num_slots=8)
    scheduler.join("a", older, (), 1.5, installed=PolicyVersion(1, 0))
    assert scheduler.evaluations.held_by("a") == PolicyVersion(1, 0)
    scheduler.evaluations.tick(99.0)
    assert scheduler.evaluations.open is not None
    assert scheduler.evaluations.open.version == PolicyVersion(1, 0)


def test_a_lease_is_adopted_by_the_session_that_its_actor_joins_next():
    scheduler = evaluating()
    session = join(scheduler)
    leases = pinned(acquire(scheduler, session, PolicyVersion(1, 0)))
    newer = Submitter(scheduler, join(scheduler, held=tuple(lease.lease_id for lease in leases)))
    assert not pinned(acquire(scheduler, newer.session_id, PolicyVersion(1, 0)))
    answer_all(newer, leases, PolicyVersion(1, 0))
    assert scheduler.evaluations.take_ended()


def test_an_answer_that_was_cut_is_counted_as_such():
    scheduler = evaluating()
    submit = Submitter(scheduler, join(scheduler))
    for lease in pinned(acquire(scheduler, submit.session_id, PolicyVersion(1, 0))):
        cut = FinishReason.LENGTH if lease.slot == 0 else FinishReason.DONE
        submit(make_message(lease, PolicyVersion(1, 0), finish_reason=cut, reward=Reward.valid(0.0)))
    answered = [r for r in scheduler.take_records() if isinstance(r, EvaluationAnswered)]
    assert [r.truncated for r in answered] == [True, False, False]


def test_a_result_is_the_same_after_it_was_written_and_read():
    scheduler = evaluating()
    submit = Submitter(scheduler, join(scheduler))
    answer_all(submit, acquire(scheduler, submit.session_id, PolicyVersion(1, 0)), PolicyVersion(1, 0))
    (result,) = scheduler.evaluations.take_ended()
    assert EvaluationResult.from_json(result.to_json()) == result
    assert json.loads(result.to_json())["scores"]["mean"]["pass_at"] == {"1": 1.0}


def test_more_passes_than_answers_are_refused_by_the_configuration():
    with pytest.raises(ConfigError, match=r"evaluation\.pass_at has 4"):
        EvaluationConfig(pass_at=(1, 4), samples_per_prompt=2)


def test_an_answer_that_came_after_the_question_was_given_up_counts_after_a_restart_too():
    answer = Answer(prompt=0, reward=1.0, num_tokens=3, truncated=False)
    faults = Counter({LeaseOutcome.DATA: 2})
    found = RecoveredEvaluation(
        number=1,
        version=PolicyVersion(1, 0),
        digest="d",
        plan="",
        slots={0: RecoveredSlot(next_attempt=2, answer=answer, faults=faults, messages=["broken"])},
    )
    evaluation = Evaluation(
        number=1, version=found.version, digest="d", plan=plan_of(CONFIG), now=0.0, deadline=1.0
    )
    evaluation.restore(found, FleetConfig())
    assert (evaluation.num_answers, evaluation.faults()) == (1, {})
