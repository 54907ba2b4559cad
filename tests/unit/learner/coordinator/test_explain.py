"""`penstock why`: who waits for whom, for how long, and what would end it."""

from __future__ import annotations

from learner.coordinator.decisions import Waiting
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.coordinator.evaluation.plan import EvaluationSource, Plan
from learner.coordinator.explain import TrainerWait, why
from learner.coordinator.fleet import ReportedStats
from learner.coordinator.leases import RolloutReport
from learner.coordinator.vigil import Vigil
from penstock.waits import WaitSummary

from .fakes import ENVIRONMENT, acquire, join, make_scheduler, start

STEP = WaitSummary(
    what="a step",
    owner="environment words at 127.0.0.1:7081",
    count=3,
    longest_seconds=41.0,
    limit_seconds=60.0,
)


def test_the_chain_goes_from_the_learner_to_the_environment():
    scheduler = make_scheduler()
    version = start(scheduler)
    session = join(scheduler, "a7")
    leases = acquire(scheduler, session, version, num=3)
    answer = scheduler.lineage.next_batch(version.epoch, 0)
    assert isinstance(answer, Waiting)
    scheduler.heartbeat(
        session,
        installed=version,
        stats=ReportedStats(),
        progress=[RolloutReport(lease.lease_id, 0, 0) for lease in leases],
        now=41.0,
        waits=[STEP],
    )
    lines = why(scheduler, TrainerWait(since=1.0, waiting=answer), 41.0)
    assert lines == [
        "the learner waits since 40.0 s for 2 more complete groups (0 of 2 ready)",
        "3 slots are with a7: no progress for up to 41.0 s; the first lease expires in 19 s",
        "1 slots are free: they wait for an actor with room",
        "a7: 3 waiting for a step from environment words at 127.0.0.1:7081, for up to 41 s; given up in 19 s",
    ]


def test_an_actor_without_work_says_why_it_gets_none():
    scheduler = make_scheduler(max_lag=0, groups_per_step=1)
    version = start(scheduler)
    busy, idle = join(scheduler, "busy"), join(scheduler, "idle")
    acquire(scheduler, busy, version)
    assert not acquire(scheduler, idle, version)
    lines = why(scheduler, None, 0.0)
    assert (
        "idle asks for work and gets none: max_lag 0: 1 groups are open, and more could not be" in lines[-1]
    )


def test_an_open_evaluation_says_what_it_waits_for():
    config = EvaluationConfig(every_steps=1, num_prompts=6, deadline_seconds=100.0)
    sources = [EvaluationSource(environment=ENVIRONMENT, num_prompts=6)]
    plan = Plan(sources, samples=1, seed=1, sampling=config.sampling(16))
    scheduler = make_scheduler(evaluation=config, plan=plan)
    version = start(scheduler)
    acquire(scheduler, join(scheduler, "a7"), version, num=4)
    lines = why(scheduler, None, 40.0)
    assert (
        "the evaluation of version 1.0 waits since 40.0 s for 6 of 6 answers: 4 are with a7; 2 are free, and wait "
        "for room on one of the 1 actors that hold it; it ends with what is there in 60 s"
    ) in lines


def test_an_actor_without_credits_and_a_silent_one_are_named():
    scheduler = make_scheduler()
    version = start(scheduler)
    full = join(scheduler, "full", now=0.0)
    join(scheduler, "silent", now=-7.0)
    scheduler.heartbeat(
        full, installed=version, stats=ReportedStats(), progress=[], now=0.0, num_unacknowledged=1024
    )
    lines = why(scheduler, None, 0.0)
    assert any("full holds 1024 unacknowledged items and has no credits left" in line for line in lines)
    assert "silent is silent for 7.0 s; its leases are granted again in 3 s" in lines


def test_a_wait_without_news_is_an_event_once():
    vigil = Vigil(seconds=60.0)
    told = [vigil.is_news(waiting=True, num_moves=5, now=float(now)) for now in range(0, 200, 20)]
    assert told.index(True) == 3
    assert sum(told) == 1
    assert not vigil.is_news(waiting=True, num_moves=6, now=200.0)
    assert not vigil.is_news(waiting=False, num_moves=6, now=300.0), "who trains does not wait"
    assert vigil.is_news(waiting=True, num_moves=6, now=360.0)
