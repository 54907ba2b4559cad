"""Waits are told by name and owner, the longest first."""

from __future__ import annotations

from penstock.waits import Waits


def test_waits_of_one_name_are_told_together():
    now = [0.0]
    waits = Waits(lambda: now[0])
    with waits.on("a step", owner="environment words", limit_seconds=60.0):
        now[0] = 10.0
        with (
            waits.on("a step", owner="environment words", limit_seconds=60.0),
            waits.on("tokens", owner="the engine", limit_seconds=120.0),
        ):
            now[0] = 15.0
            step, tokens = waits.summary()
    assert (step.what, step.count, step.longest_seconds, step.limit_seconds) == ("a step", 2, 15.0, 60.0)
    assert (tokens.owner, tokens.count, tokens.longest_seconds) == ("the engine", 1, 5.0)
    assert waits.summary() == []
