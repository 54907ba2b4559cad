"""What must hold in a run's ledger, checked from its files alone: `penstock ledger`.

Reads one snapshot, so a ledger may be checked while its learner runs; page checksums and
the log's are verified on the way. Pure but for those files: no process, no folder of
checkpoints, no configuration is looked at.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from learner.coordinator import database, segments, tables
from learner.coordinator.evaluation.audit import evaluations
from learner.coordinator.ledger import Totals, read_totals
from penstock.errors import LedgerError

_MOST_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """An invariant that does not hold."""

    invariant: str
    """Its name in INVARIANTS."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """A run's ledger, summed up and checked."""

    run_id: str
    finished: bool
    lineages: tuple[tuple[int, int], ...]
    """(epoch, step of the checkpoint that it started from)."""
    num_versions: int
    newest: tuple[int, int] | None
    """(epoch, step)."""
    num_steps: int
    """Steps trained in the surviving lineage."""
    groups: dict[str, int]
    """Count by state."""
    totals: Totals
    payloads_from: int | None
    """The first step from which every trained trajectory's payload is kept; None if none are."""
    violations: tuple[Violation, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the invariants that do not hold."""
        return tuple(sorted({violation.invariant for violation in self.violations}))


def audit(path: Path) -> Audit:
    """Checks a ledger's file. Raises LedgerError if it cannot be read at all."""
    if not path.is_file():
        raise LedgerError(f"{path}: no such ledger; expected the folder of a run")
    try:
        with contextlib.closing(database.open_reader(path)) as db, db:
            database.check_format(db, path)
            found = _audit(db)
    except apsw.Error as error:
        raise LedgerError(f"{path}: the ledger cannot be read: {database.explain(error)}") from error
    return found


def _audit(db: apsw.Connection) -> Audit:
    meta = dict(db.execute("SELECT name, value FROM meta"))
    lineages = tuple(db.execute("SELECT epoch, step FROM lineages ORDER BY epoch"))
    newest: list[Any] = db.execute(
        "SELECT epoch, step FROM versions ORDER BY epoch DESC, step DESC LIMIT 1"
    ).fetchall()
    ((num_versions,),) = db.execute("SELECT count(*) FROM versions")
    ((num_steps,),) = db.execute("SELECT count(DISTINCT step) FROM groups WHERE state = 'trained'")
    violations = [
        Violation(invariant=name, message=message)
        for name, (_, check) in INVARIANTS.items()
        for message in check(db)
    ]
    return Audit(
        run_id=meta["run_id"],
        finished="finished" in meta,
        lineages=lineages,
        num_versions=num_versions,
        newest=newest[0] if newest else None,
        num_steps=num_steps,
        groups=dict(db.execute("SELECT state, count(*) FROM groups GROUP BY state")),
        totals=read_totals(db),
        payloads_from=_payloads_from(db),
        violations=tuple(violations),
    )


def _payloads_from(db: apsw.Connection) -> int | None:
    ((last, missing),) = db.execute(
        "SELECT max(step), max(iif(segment IS NULL, step, -1)) FROM trajectories WHERE state = 'trained'"
    )
    if last is None or missing == last:
        return None
    return int(missing) + 1


# -- the invariants: each yields what contradicts it -------------------------------------


def _database(db: apsw.Connection) -> Iterator[str]:
    for (line,) in db.execute(f"PRAGMA integrity_check({_MOST_NAMED})"):
        if line != "ok":
            yield line


def _payloads(db: apsw.Connection) -> Iterator[str]:
    rows: list[Any] = db.execute(
        "SELECT trajectory_id, segment, offset, num_bytes, checksum FROM trajectories "
        "WHERE segment IS NOT NULL ORDER BY segment, offset"
    ).fetchall()
    found = segments.read(segments.folder_of(Path(db.filename)), tables.places(row[1:] for row in rows))
    wrong = [row for row, payload in zip(rows, found, strict=True) if payload is None]
    kept = _segments_now(db) if wrong else set()
    for name, segment, *_ in wrong:
        if segment in kept:
            yield f"the payload of {name} is not what its actor sent"


def _segments_now(db: apsw.Connection) -> set[int]:
    """Those that a learner which runs has not deleted since the snapshot was taken."""
    with contextlib.closing(database.open_reader(Path(db.filename))) as now:
        return {number for (number,) in now.execute("SELECT number FROM segments")}


def _conservation(db: apsw.Connection) -> Iterator[str]:
    """accepted = trained + pending + stale + surplus + group_dropped + quarantined."""
    ((accepted,),) = db.execute("SELECT coalesce(max(value), 0) FROM tallies WHERE name = 'accepted'")
    ((rows,),) = db.execute("SELECT count(*) FROM trajectories")
    if accepted != rows:
        yield f"{accepted} trajectories were accepted; {rows} are accounted for"


def _one_end_each(db: apsw.Connection) -> Iterator[str]:
    """I1: an accepted trajectory is trained once, pending, or has one terminal reason."""
    yield from _named(
        db,
        "are {} in a group that is {}",
        "SELECT trajectory_id, t.state, coalesce(g.state, 'missing') FROM trajectories t "
        "LEFT JOIN groups g USING (group_id) WHERE NOT coalesce(CASE t.state "
        "WHEN 'pending' THEN g.state IN ('open', 'assigned') "
        "WHEN 'trained' THEN g.state = 'trained' AND g.step = t.step "
        "WHEN 'stale' THEN 1 WHEN 'surplus' THEN 1 "
        "WHEN 'group_dropped' THEN g.state = 'dropped' WHEN 'quarantined' THEN g.state = 'dropped' END, 0)",
    )
    yield from _named(
        db,
        "are pending without a payload",
        "SELECT trajectory_id FROM trajectories WHERE state = 'pending' AND segment IS NULL",
    )
    yield from _named(
        db,
        "were handed over in part, and kept although their group is closed",
        "SELECT group_id || '.' || slot FROM partials WHERE num_tokens < 1 "
        "OR group_id IN (SELECT group_id FROM groups WHERE state IN ('trained', 'dropped'))",
    )
    yield from _named(
        db,
        "came on a lease that was never granted",
        "SELECT trajectory_id FROM trajectories LEFT JOIN leases l USING (group_id, slot, attempt) "
        "WHERE l.session_id IS NULL",
    )
    yield from _named(
        db,
        "have the id of another",
        "SELECT trajectory_id FROM trajectories GROUP BY trajectory_id HAVING count(*) > 1",
    )


def _surviving_once(db: apsw.Connection) -> Iterator[str]:
    """I2: the surviving steps follow one another, each on groups of its own, up to the newest version."""
    trained = dict(
        db.execute("SELECT step, count(*) FROM groups WHERE state = 'trained' GROUP BY step ORDER BY step")
    )
    lineages: list[Any] = db.execute("SELECT epoch, step FROM lineages ORDER BY epoch").fetchall()
    epoch, start = lineages[-1] if lineages else (0, 0)
    published: list[Any] = db.execute("SELECT step FROM versions WHERE epoch = ?", (epoch,)).fetchall()
    reached = max((step for (step,) in published), default=start)
    if list(trained) != list(range(reached)):
        missing = sorted(set(range(reached)) - trained.keys()) or sorted(trained.keys() - set(range(reached)))
        yield f"steps 0 to {reached - 1} should each be trained once: {missing[:_MOST_NAMED]} contradict it"
    yield from _named(
        db,
        "share slot {}.{} with another that is trained or pending",
        "SELECT max(trajectory_id), group_id, slot FROM trajectories WHERE state IN ('trained', 'pending') "
        "GROUP BY group_id, slot HAVING count(*) > 1",
    )


def _prefixes(db: apsw.Connection) -> Iterator[str]:
    """I3: what was acknowledged in a session is a prefix of what it sent."""
    yield from _named(
        db,
        "have number {} in a session acknowledged up to {}",
        "SELECT trajectory_id, sequence, coalesce(acknowledged, 0) FROM trajectories "
        "LEFT JOIN sessions USING (session_id) WHERE sequence > coalesce(acknowledged, 0)",
    )
    yield from _named(
        db,
        "have the number of another in their session",
        "SELECT max(trajectory_id) FROM trajectories GROUP BY session_id, sequence HAVING count(*) > 1",
    )


def _names(db: apsw.Connection) -> Iterator[str]:
    """I4: a lineage starts from the very tensors of the version that its checkpoint was of."""
    versions: dict[tuple[int, int], str] = {
        (epoch, step): digest
        for epoch, step, digest in db.execute("SELECT epoch, step, digest FROM versions")
    }
    for epoch, step in db.execute("SELECT epoch, step FROM lineages ORDER BY epoch"):
        digest = versions.get((epoch, step))
        before = [e for e in range(epoch - 1, 0, -1) if (e, step) in versions]
        if digest is not None and before and versions[before[0], step] != digest:
            yield (
                f"version {epoch}.{step} was restored with digest {digest[:12]}; version {before[0]}.{step} had "
                f"{versions[before[0], step][:12]}"
            )


def _groups(db: apsw.Connection) -> Iterator[str]:
    """I6: a group is distinct slots of one prompt."""
    yield from _named(
        db,
        "are of slot {} in a group of {}, or of another environment than it",
        "SELECT trajectory_id, slot, num_slots FROM trajectories t JOIN groups g USING (group_id) "
        "WHERE slot >= num_slots OR t.environment <> g.environment",
    )
    for (group_id,) in db.execute(
        "SELECT group_id FROM trajectories WHERE state IN ('trained', 'pending') "
        "GROUP BY group_id HAVING count(DISTINCT observation_digest) > 1 LIMIT ?",
        (_MOST_NAMED,),
    ):
        yield f"group {group_id} has members that began with different observations"


def _lags(db: apsw.Connection) -> Iterator[str]:
    """I7: what was trained is no older than the bound of the lineage that trained it."""
    epochs = dict(db.execute("SELECT step, max(epoch) FROM versions GROUP BY step"))
    bounds = dict(db.execute("SELECT epoch, max_lag FROM lineages"))
    for step, lag in db.execute(
        "SELECT step, max(lag) FROM trajectories WHERE state = 'trained' GROUP BY step ORDER BY step"
    ):
        bound = bounds.get(epochs.get(step + 1))
        if bound is not None and lag > bound:
            yield f"step {step} trained on a trajectory {lag} versions old; max_lag was {bound}"


def _monotone(db: apsw.Connection) -> Iterator[str]:
    """I9: epochs and, in each, versions follow one another."""
    starts = dict(db.execute("SELECT epoch, step FROM lineages ORDER BY epoch"))
    if list(starts) != list(range(1, len(starts) + 1)):
        yield f"epochs are {list(starts)[:10]}; expected 1 to {len(starts)}"
    for epoch, first, last, count in db.execute(
        "SELECT epoch, min(step), max(step), count(*) FROM versions GROUP BY epoch"
    ):
        if first != starts.get(epoch) or last - first + 1 != count:
            yield (
                f"epoch {epoch} started from step {starts.get(epoch)} and has {count} versions, {first} to {last}"
            )


def _tallies(db: apsw.Connection) -> Iterator[str]:
    """I10: counters equal the ledger."""
    totals = read_totals(db)
    for what, tallied, column in (
        ("state", {str(state): n for state, n in totals.by_state.items()}, "state"),
        ("environment", totals.by_environment, "environment"),
    ):
        counted = dict(db.execute(f"SELECT {column}, count(*) FROM trajectories GROUP BY {column}"))  # noqa: S608
        if counted != tallied:
            yield f"tallies by {what} are {tallied}; the rows say {counted}"
    for number, named, counted in db.execute(
        "SELECT number, num_payloads, coalesce(n, 0) FROM segments LEFT JOIN "
        "(SELECT segment, count(*) AS n FROM trajectories GROUP BY segment) ON segment = number "
        "WHERE num_payloads <> coalesce(n, 0)"
    ):
        yield f"segment {number} is said to hold {named} payloads; {counted} trajectories name it"
    trained: list[Any] = db.execute(
        "SELECT coalesce(max(lag), 0), coalesce(sum(mixed), 0), coalesce(sum(num_sampled), 0) "
        "FROM trajectories WHERE state = 'trained'"
    ).fetchall()
    tallied_trained = (totals.max_lag_trained, totals.mixed_version_trained, totals.tokens_trained)
    if trained != [tallied_trained]:
        yield f"trained lag, mixed and tokens are tallied as {tallied_trained}; the rows say {trained[0]}"


def _named(db: apsw.Connection, what: str, sql: str) -> Iterator[str]:
    """One line for all rows of a query: how many there are, and the first few ids (its first column)."""
    rows: list[tuple[Any, ...]] = db.execute(sql).fetchall()
    for rest, count in Counter(row[1:] for row in rows).items():
        ids = [str(row[0]) for row in rows if row[1:] == rest][:_MOST_NAMED]
        yield f"{count} trajectories {what.format(*rest)}: {', '.join(ids)}"


Check = Callable[[apsw.Connection], Iterator[str]]
INVARIANTS: dict[str, tuple[str, Check]] = {
    "database": ("every page has its checksum, and indexes agree with tables", _database),
    "payloads": ("every payload kept has the checksum that its actor made of it", _payloads),
    "conservation": (
        "accepted = trained + pending + stale + surplus + group_dropped + quarantined",
        _conservation,
    ),
    "I1": ("each accepted trajectory is trained once, pending, or has one end", _one_end_each),
    "I2": ("surviving steps follow one another, and no slot is trained twice", _surviving_once),
    "I3": ("acknowledgements of a session are a prefix", _prefixes),
    "I4": ("a restored version has the digest that it had", _names),
    "I6": ("a group is distinct slots of one prompt", _groups),
    "I7": ("trained lag is within max_lag", _lags),
    "I9": ("epochs and versions follow one another", _monotone),
    "I10": ("counters equal the rows", _tallies),
    "I11": ("an evaluation is of one version, with one answer a slot", evaluations),
}
"""By name: what holds, and the check."""
