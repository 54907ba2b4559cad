"""When an environment is left out, and when it is leased again."""

from __future__ import annotations

from learner.config import BreakerConfig
from learner.coordinator.breaker import Breaker, BreakerState

CLOSED, OPEN, PROBING = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.PROBING


def fail(breaker: Breaker, num: int, *, now: float = 0.0) -> list[BreakerState | None]:
    return [breaker.rollout_ended(f"f{n}", failure="refused", now=now) for n in range(num)]


def learn(breaker: Breaker, seconds: float) -> None:
    """What is usual."""
    for _ in range(32):
        breaker.answered(1, seconds)


def look(breaker: Breaker, *waits: float, now: float = 0.0, others_go_on: bool = True) -> BreakerState | None:
    by_lease = {f"w{n}": wait for n, wait in enumerate(waits)}
    waiting = {lease_id: wait for lease_id, wait in by_lease.items() if wait > 0}
    return breaker.look(waiting, lambda: set(by_lease), others_go_on=others_go_on, now=now)


def opened(*, now: float = 0.0, seconds: float = 1.0) -> Breaker:
    breaker = Breaker(BreakerConfig())
    learn(breaker, seconds)
    fail(breaker, 3, now=now)
    return breaker


def test_an_environment_whose_rollouts_fail_is_left_out_until_two_probes_end_well():
    breaker = Breaker(BreakerConfig(failures=3, probe_seconds=5.0))
    assert fail(breaker, 3, now=1.0) == [None, None, OPEN]
    assert not breaker.may_lease
    assert breaker.reason == "3 of its last 3 rollouts failed: refused"
    assert look(breaker, now=5.9) is None
    assert look(breaker, now=6.0) is PROBING
    for probe in ("p1", "p2"):
        assert breaker.may_lease
        breaker.leased(probe)
    assert not breaker.may_lease, "two are enough"
    assert look(breaker, 0.0, 0.0, now=7.0) is None
    breaker.leased("w0")
    assert breaker.rollout_ended("p1", failure="", now=7.0) is None


def test_it_is_closed_by_its_second_good_probe():
    breaker = opened()
    look(breaker, now=5.0)
    for probe in ("p1", "p2"):
        breaker.leased(probe)
    assert breaker.rollout_ended("p1", failure="", now=6.0) is None
    assert breaker.rollout_ended("p2", failure="", now=6.0) is CLOSED
    assert breaker.may_lease


def test_few_failures_among_many_are_no_outage():
    breaker = Breaker(BreakerConfig(failures=3))
    for number in range(40):
        failure = "refused" if number % 4 == 0 else ""
        assert breaker.rollout_ended(str(number), failure=failure, now=0.0) is None


def test_a_failed_probe_doubles_the_pause_up_to_twelve_times_the_first():
    breaker = opened()
    now, pauses = 0.0, []
    for _ in range(6):
        pauses.append(breaker.probe_due_seconds(now))
        now += pauses[-1]
        assert look(breaker, now=now) is PROBING
        breaker.leased("p")
        assert breaker.rollout_ended("p", failure="refused", now=now) is OPEN
    assert pauses == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


def close(breaker: Breaker, now: float) -> None:
    look(breaker, now=now)
    for probe in ("p1", "p2"):
        breaker.leased(probe)
        breaker.rollout_ended(probe, failure="", now=now)
    assert breaker.state is CLOSED


def test_one_that_fails_again_soon_is_tried_later_and_one_that_was_sound_is_not():
    breaker = opened()
    close(breaker, 5.0)
    fail(breaker, 3, now=10.0)
    assert breaker.probe_due_seconds(10.0) == 10.0
    close(breaker, 20.0)
    fail(breaker, 3, now=100.0)
    assert breaker.probe_due_seconds(100.0) == 5.0


def test_one_that_does_not_answer_is_left_out_by_what_is_usual_for_it():
    quick, slow = Breaker(BreakerConfig()), Breaker(BreakerConfig())
    learn(quick, 1.0)
    learn(slow, 10.0)
    assert quick.overdue_seconds == 8.0
    assert look(quick, 7.9, 7.9, 7.9) is None
    assert look(quick, 8.1, 8.1, 8.1) is OPEN
    assert look(slow, 60.0, 60.0, 60.0) is None


def test_what_takes_little_time_is_never_overdue():
    breaker = Breaker(BreakerConfig(slow_seconds=5.0))
    learn(breaker, 0.001)
    assert breaker.overdue_seconds == 5.0


def test_nothing_is_overdue_while_nothing_is_usual_or_where_no_factor_is_set():
    fresh, never = Breaker(BreakerConfig()), Breaker(BreakerConfig(slow_factor=0.0))
    learn(never, 0.1)
    assert look(fresh, *[1000.0] * 10) is None
    assert look(never, *[1000.0] * 10) is None


def test_a_few_calls_that_hang_among_many_are_no_outage():
    breaker = Breaker(BreakerConfig())
    learn(breaker, 1.0)
    assert look(breaker, 100.0, 100.0, 100.0, 0.0, 0.0, 0.0, 0.0) is None
    assert look(breaker, 100.0, 100.0, 100.0, 0.0, 0.0, 0.0) is OPEN


def test_a_slow_environment_is_not_left_out_where_nobody_would_gain_by_it():
    breaker = Breaker(BreakerConfig())
    learn(breaker, 1.0)
    assert look(breaker, 100.0, 100.0, 100.0, others_go_on=False) is None
    assert fail(breaker, 3)[-1] is OPEN, "one that fails would only use up its tasks"


def test_an_overdue_probe_is_a_failed_one():
    breaker = opened()
    look(breaker, now=5.0)
    breaker.leased("w0")
    assert look(breaker, 7.0, now=6.0) is None
    assert look(breaker, 9.0, now=7.0) is OPEN


def test_a_probe_whose_actor_died_says_nothing():
    breaker = opened()
    look(breaker, now=5.0)
    for probe in ("w0", "p2"):
        breaker.leased(probe)
    assert not breaker.may_lease
    assert look(breaker, 0.0, now=6.0) is None
    assert breaker.may_lease, "another may be tried in its place"


def test_what_is_usual_is_not_learnt_from_an_outage():
    breaker = opened(seconds=1.0)
    learn(breaker, 1000.0)
    assert breaker.overdue_seconds == 8.0
