"""An engine that is asked for tokens and makes none is found, whatever heartbeats say."""

from __future__ import annotations

from actors.heartbeat import Standstill


def test_an_engine_that_makes_no_token_while_asked_is_at_a_standstill():
    standstill = Standstill(seconds=120.0)
    assert not standstill.is_over(asked_seconds=0.0, num_tokens=10, now=0.0)
    assert not standstill.is_over(asked_seconds=119.0, num_tokens=10, now=130.0)
    assert standstill.is_over(asked_seconds=120.0, num_tokens=10, now=131.0)


def test_a_request_that_waits_while_others_move_is_no_standstill():
    standstill = Standstill(seconds=120.0)
    for now in range(0, 600, 100):
        assert not standstill.is_over(asked_seconds=500.0, num_tokens=now, now=float(now))


def test_an_engine_that_nobody_asks_may_rest():
    standstill = Standstill(seconds=120.0)
    standstill.is_over(asked_seconds=0.0, num_tokens=10, now=0.0)
    assert not standstill.is_over(asked_seconds=3.0, num_tokens=10, now=900.0)
