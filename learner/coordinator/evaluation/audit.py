"""What must hold of evaluations in a run's ledger: part of `penstock ledger`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import apsw

_MOST_NAMED = 5


def evaluations(db: apsw.Connection) -> Iterator[str]:
    """I11: every token of an evaluation is of its version, and a slot has one answer that counts."""
    yield from _versions(db)
    for what, sql in _CHECKS:
        rows: list[Any] = db.execute(sql).fetchall()
        if rows:
            names = ", ".join(str(row[0]) for row in rows[:_MOST_NAMED])
            yield f"{len(rows)} {what}: {names}"


def _versions(db: apsw.Connection) -> Iterator[str]:
    rows = db.execute(
        "SELECT trajectory_id, a.number, epoch, step, versions, num_sampled FROM evaluation_answers a "
        "LEFT JOIN evaluations USING (number) WHERE a.state = 'counted'"
    )
    for name, number, epoch, step, versions, num_sampled in rows:
        if json.loads(versions) != [[epoch, step, num_sampled]]:
            yield (
                f"answer {name} of evaluation {number} has tokens of {versions}; expected all {num_sampled} of "
                f"version {epoch}.{step}"
            )


_CHECKS = (
    (
        "slots have more than one answer that counts",
        "SELECT number || '.' || slot FROM evaluation_answers WHERE state = 'counted' "
        "GROUP BY number, slot HAVING count(*) > 1",
    ),
    (
        "evaluation answers came on a lease that was never granted, or on a slot that there is not",
        "SELECT trajectory_id FROM evaluation_answers LEFT JOIN evaluation_leases l USING (number, slot, attempt) "
        "LEFT JOIN evaluations e USING (number) WHERE l.session_id IS NULL OR slot >= coalesce(e.num_slots, 0)",
    ),
    (
        "evaluation answers are among the trajectories that train",
        "SELECT trajectory_id FROM evaluation_answers JOIN trajectories USING (trajectory_id)",
    ),
    (
        "evaluations are open although a later one is",
        "SELECT number FROM evaluations WHERE state = 'open' AND number < (SELECT max(number) FROM evaluations)",
    ),
    (
        "evaluations have a result that counts other answers than the ledger has",
        "SELECT number FROM evaluations e WHERE result IS NOT NULL AND result ->> 'num_answers' <> "
        "(SELECT count(*) FROM evaluation_answers a WHERE a.number = e.number AND a.state = 'counted')",
    ),
)
