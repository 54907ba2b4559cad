"""The rules of sessions, under a clock that only the test moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from environments.sessions import Call, Refusal, Session, SessionRefused, SessionTable
from penstock.trajectory import Task

TASK = Task("game", "train", 0, 7)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> SessionTable[str, str]:
    return SessionTable(ttl_seconds=60.0, max_sessions=2, clock=clock)


def opened(table: SessionTable[str, str], session_id: str = "a", fence: int = 1) -> Session[str, str]:
    session, _ = table.begin_reset(session_id, fence, TASK)
    session.reset.outcome = "first observation"
    table.answer(session, session.reset, done=False)
    return session


def step(
    table: SessionTable[str, str], index: int, action: str, *, answer: str = "ok", done: bool = False
) -> Call[str]:
    session, call = table.begin_step("a", 1, index, action)
    assert call.outcome is None
    call.outcome = answer
    table.answer(session, call, done=done)
    return call


def refused(refusal: Refusal) -> pytest.RaisesExc[SessionRefused]:
    return pytest.RaisesExc(SessionRefused, check=lambda error: error.refusal is refusal)


def test_an_episode_is_a_reset_and_steps_in_order(table: SessionTable[str, str]) -> None:
    session = opened(table)
    step(table, 0, "left")
    step(table, 1, "right", done=True)
    assert session.num_steps == 2
    assert session.done
    assert table.close("a", 1) is session
    assert len(table) == 0


def test_a_repeated_reset_finds_the_answer_of_the_first(table: SessionTable[str, str]) -> None:
    session = opened(table)
    again, replaced = table.begin_reset("a", 1, TASK)
    assert again is session
    assert replaced is None
    assert again.reset.outcome == "first observation"


def test_a_reset_that_is_repeated_after_steps_leaves_them_alone(table: SessionTable[str, str]) -> None:
    opened(table)
    step(table, 0, "left")
    again, _ = table.begin_reset("a", 1, TASK)
    assert again.reset.outcome == "first observation"
    assert again.num_steps == 1


def test_a_reset_of_another_task_under_the_same_fence_is_a_conflict(table: SessionTable[str, str]) -> None:
    opened(table)
    with refused(Refusal.CONFLICT):
        table.begin_reset("a", 1, replace(TASK, seed=8))


def test_a_higher_fence_replaces_and_the_lower_one_is_fenced(table: SessionTable[str, str]) -> None:
    first = opened(table)
    second, replaced = table.begin_reset("a", 2, TASK)
    assert replaced is first
    assert second.num_steps == 0
    for late in (
        lambda: table.begin_reset("a", 1, TASK),
        lambda: table.begin_step("a", 1, 0, "left"),
        lambda: table.renew("a", 1),
        lambda: table.close("a", 1),
    ):
        with refused(Refusal.FENCED):
            late()


def test_a_fence_that_was_never_reset_is_lost(table: SessionTable[str, str]) -> None:
    opened(table)
    with refused(Refusal.LOST):
        table.begin_step("a", 2, 0, "left")


def test_a_repeated_step_finds_its_answer(table: SessionTable[str, str]) -> None:
    opened(table)
    step(table, 0, "left", answer="a wall")
    _, call = table.begin_step("a", 1, 0, "left")
    assert call.outcome == "a wall"


def test_a_step_repeated_while_it_runs_finds_the_same_call(table: SessionTable[str, str]) -> None:
    opened(table)
    _, call = table.begin_step("a", 1, 0, "left")
    call.outcome = "still running"
    _, again = table.begin_step("a", 1, 0, "left")
    assert again is call


@pytest.mark.parametrize(("index", "action"), [(0, "right"), (2, "left"), (7, "left")])
def test_another_action_or_an_index_out_of_order_is_a_conflict(
    table: SessionTable[str, str], index: int, action: str
) -> None:
    opened(table)
    step(table, 0, "left")
    with refused(Refusal.CONFLICT):
        table.begin_step("a", 1, index, action)


def test_a_step_before_the_last_call_is_answered_is_a_conflict(table: SessionTable[str, str]) -> None:
    session, _ = table.begin_reset("a", 1, TASK)
    with refused(Refusal.CONFLICT):
        table.begin_step("a", 1, 0, "left")
    table.answer(session, session.reset, done=False)
    table.begin_step("a", 1, 0, "left")
    with refused(Refusal.CONFLICT):
        table.begin_step("a", 1, 1, "left")


def test_nothing_follows_the_step_that_is_done(table: SessionTable[str, str]) -> None:
    opened(table)
    step(table, 0, "left", done=True)
    with refused(Refusal.CONFLICT):
        table.begin_step("a", 1, 1, "left")
    assert table.begin_step("a", 1, 0, "left")[1].outcome == "ok"


def test_a_session_expires_after_its_time_to_live_and_not_before(
    table: SessionTable[str, str], clock: Clock
) -> None:
    session = opened(table)
    clock.now += 59.9
    assert table.expire() == []
    clock.now += 0.1
    assert table.expire() == [session]
    with refused(Refusal.LOST):
        table.begin_step("a", 1, 0, "left")


def test_every_call_extends_a_session(table: SessionTable[str, str], clock: Clock) -> None:
    opened(table)
    clock.now += 59.0
    table.renew("a", 1)
    clock.now += 59.0
    step(table, 0, "left")
    clock.now += 59.0
    assert table.expire() == []


def test_a_session_with_a_call_under_way_does_not_expire(table: SessionTable[str, str], clock: Clock) -> None:
    session = opened(table)
    _, call = table.begin_step("a", 1, 0, "left")
    clock.now += 1000.0
    assert table.expire() == []
    table.answer(session, call, done=False)
    clock.now += 60.0
    assert table.expire() == [session]


def test_a_session_that_is_gone_is_opened_again_only_under_a_higher_fence(
    table: SessionTable[str, str],
) -> None:
    opened(table, fence=3)
    table.close("a", 3)
    with refused(Refusal.LOST):
        table.begin_reset("a", 3, TASK)
    with refused(Refusal.FENCED):
        table.begin_reset("a", 2, TASK)
    with refused(Refusal.FENCED):
        table.begin_step("a", 2, 0, "left")
    session, replaced = table.begin_reset("a", 4, TASK)
    assert session.fence == 4
    assert replaced is None


def test_closing_what_is_not_open_is_no_error(table: SessionTable[str, str]) -> None:
    assert table.close("never", 1) is None
    opened(table)
    table.close("a", 1)
    assert table.close("a", 1) is None


def test_no_more_sessions_are_opened_than_allowed(table: SessionTable[str, str]) -> None:
    opened(table, "a")
    opened(table, "b")
    with refused(Refusal.FULL):
        table.begin_reset("c", 1, TASK)
    table.close("b", 1)
    opened(table, "c")


def test_replacing_a_session_needs_no_room_for_another(table: SessionTable[str, str]) -> None:
    opened(table, "a")
    opened(table, "b")
    table.begin_reset("b", 2, TASK)
    assert len(table) == 2


def test_a_failed_call_takes_the_session_with_it_unless_it_can_be_recovered(
    table: SessionTable[str, str],
) -> None:
    session = opened(table)
    _, call = table.begin_step("a", 1, 0, "left")
    assert not table.fail(session, call, recoverable=True)
    _, again = table.begin_step("a", 1, 0, "right")
    assert table.fail(session, again, recoverable=False)
    with refused(Refusal.LOST):
        table.begin_step("a", 1, 0, "left")


def test_a_call_that_fails_after_its_session_was_replaced_harms_nobody(
    table: SessionTable[str, str],
) -> None:
    first = opened(table)
    _, call = table.begin_step("a", 1, 0, "left")
    second, _ = table.begin_reset("a", 2, TASK)
    assert not table.fail(first, call, recoverable=False)
    table.renew("a", 2)
    assert len(table) == 1
    assert second.fence == 2
