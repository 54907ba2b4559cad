"""Deadlines of live leases, against a table that looks at all of them each time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from learner.coordinator.leases import LeaseTable, RolloutReport

TIMEOUT = 10.0

MOVES = st.lists(
    st.tuples(
        st.sampled_from(["grant", "progress", "wait", "end", "adopt", "shift", "look"]),
        st.integers(0, 5),
        st.floats(0.0, 6.0),
    ),
    max_size=60,
)


@given(MOVES)
def test_each_lease_expires_at_the_first_look_after_its_deadline(moves: list[tuple[str, int, float]]):
    table, deadlines, now = LeaseTable(progress_timeout=TIMEOUT), dict[str, float](), 0.0
    waiting: set[str] = set()
    for tokens, (what, slot, seconds) in enumerate(moves, start=1):
        now += seconds
        lease_id = f"0.{slot}.0"
        if what == "grant" and lease_id not in deadlines:
            table.grant(group_id=0, slot=slot, attempt=0, session_id="a", now=now)
            deadlines[lease_id] = now + TIMEOUT
        elif what in ("progress", "wait"):
            report = RolloutReport(lease_id, tokens, 0, seconds if what == "wait" else 0.0)
            table.progress(report, "a", now)
            if lease_id in deadlines:
                deadlines[lease_id] = now + TIMEOUT
                (waiting.add if report.environment_seconds > 0 else waiting.discard)(lease_id)
        elif what == "end":
            assert (table.end(lease_id) is None) == (lease_id not in deadlines)
            deadlines.pop(lease_id, None)
        elif what == "adopt" and lease_id in deadlines:
            table.adopt(lease_id, "a", now)
            deadlines[lease_id] = now + TIMEOUT
        elif what == "shift":
            table.shift(seconds)
            deadlines = {name: deadline + seconds for name, deadline in deadlines.items()}
        elif what == "look":
            expired = {lease.lease_id for lease in table.expired(now)}
            assert expired == {name for name, deadline in deadlines.items() if deadline <= now}
            for name in expired:
                table.end(name)
                del deadlines[name]
        waiting &= deadlines.keys()
        assert {lease.lease_id for lease in table.waiting()} == waiting
