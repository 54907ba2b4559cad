"""Do a run's ledger, its actors' histories and its trainer's journal tell one story?

Each function checks one invariant and yields what contradicts it. Pure: it looks at
evidence (`penstock.chaos.evidence`), never at a running process.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from penstock.chaos.evidence import Evidence

_STORED = frozenset({"accepted", "stale", "surplus", "quarantined"})
_STATES = frozenset({"pending", "trained", "stale", "surplus", "group_dropped", "quarantined"})


class Invariant(StrEnum):
    ACKNOWLEDGED_IS_KEPT = "what was acknowledged is in the ledger, in one state"
    TRAINED_ONCE = "no trajectory is in two surviving steps"
    PREFIX = "the acknowledgements of a session are a prefix of what it sent"
    ONE_DIGEST = "a version's digest is a function of its name"
    WHOLE_GROUPS = "a trained group is distinct slots of one prompt"
    BOUNDED_LAG = "no trained trajectory is older than the bound"
    MONOTONE = "versions grow by one step, and epochs by one"
    COUNTED = "the counters equal the ledger"


@dataclass(frozen=True, slots=True)
class Violation:
    invariant: Invariant
    what: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    violations: tuple[Violation, ...] = ()
    accepted: int = 0
    trained: int = 0
    lost: int = 0
    """Trajectories that were acknowledged and are not in the ledger."""
    trained_twice: int = 0
    steps: dict[int, frozenset[str]] = field(default_factory=dict)
    """The trajectories of every surviving step."""


def check(evidence: Evidence, *, max_lag: int) -> Findings:
    """All invariants at once."""
    lost = sorted(lost_ids(evidence))
    twice = sorted(trained_twice(evidence))
    violations = [
        *(Violation(Invariant.ACKNOWLEDGED_IS_KEPT, f"{name} is not in the ledger") for name in lost),
        *(Violation(Invariant.TRAINED_ONCE, f"{name} is in two steps") for name in twice),
        *_check_states(evidence),
        *_check_journal(evidence),
        *_check_prefix(evidence),
        *_check_digests(evidence),
        *_check_groups(evidence),
        *_check_lag(evidence, max_lag),
        *_check_order(evidence),
        *_check_tallies(evidence),
    ]
    rows = evidence.ledger.rows.values()
    return Findings(
        violations=tuple(violations),
        accepted=len(rows),
        trained=sum(row.state == "trained" for row in rows),
        lost=len(lost),
        trained_twice=len(twice),
        steps=_trained_by_step(evidence),
    )


def lost_ids(evidence: Evidence) -> set[str]:
    """Acknowledged, not rejected, and absent from the ledger.

    An item that is sent again after its rejection was lost on the way is answered as a
    duplicate: as many absent duplicates are forgiven as there are rejections unheard of.
    """
    missing: set[str] = set()
    duplicates: set[str] = set()
    heard = 0
    for session in evidence.sessions.values():
        for sequence in range(1, max(session.acknowledged, default=0) + 1):
            name = session.sent.get(sequence, "")
            kind, _ = session.verdicts.get(sequence, ("unheard", ""))
            heard += kind == "rejected"
            if name and kind != "rejected" and name not in evidence.ledger.rows:
                (missing if kind in _STORED else duplicates).add(name)
    rejected = sum(n for name, n in evidence.ledger.tallies.items() if name.startswith("rejected:"))
    forgiven = max(rejected - heard, 0)
    return missing | set(sorted(duplicates)[forgiven:])


def trained_twice(evidence: Evidence) -> set[str]:
    """Trajectories of more than one surviving step, as the trainer wrote it down."""
    if evidence.journal is None:
        return set()
    on_disk = _trained_by_step(evidence)
    counts = Counter(
        name
        for step, groups in evidence.journal.steps.items()
        if step in on_disk
        for names in groups.values()
        for name in names
    )
    return {name for name, count in counts.items() if count > 1}


def _check_states(evidence: Evidence) -> Iterator[Violation]:
    for row in evidence.ledger.rows.values():
        group = evidence.ledger.groups.get(row.group_id)
        if row.state not in _STATES:
            yield Violation(Invariant.ACKNOWLEDGED_IS_KEPT, f"{row.trajectory_id} is {row.state!r}")
        elif group is None:
            yield Violation(Invariant.ACKNOWLEDGED_IS_KEPT, f"{row.trajectory_id} has no group")
        elif (row.state == "pending") and group.state != "open":
            what = f"{row.trajectory_id} is pending in group {row.group_id}, which is {group.state}"
            yield Violation(Invariant.ACKNOWLEDGED_IS_KEPT, what)
        elif (row.state == "trained") != (row.step is not None):
            yield Violation(Invariant.TRAINED_ONCE, f"{row.trajectory_id} is {row.state} in step {row.step}")


def _check_journal(evidence: Evidence) -> Iterator[Violation]:
    """What the ledger says was trained is what the trainer trained on."""
    if evidence.journal is None:
        return
    for step, names in _trained_by_step(evidence).items():
        groups = evidence.journal.steps.get(step, {})
        trained = {name for group in groups.values() for name in group}
        if trained != names:
            what = (
                f"step {step}: the ledger has {_some(names - trained)}, the trainer {_some(trained - names)}"
            )
            yield Violation(Invariant.TRAINED_ONCE, what)
        for group_id, members in groups.items():
            strangers = {n for n in members if n in names and evidence.ledger.rows[n].group_id != group_id}
            if strangers:
                what = f"group {group_id} was trained with {_some(strangers)}"
                yield Violation(Invariant.WHOLE_GROUPS, what)


def _check_prefix(evidence: Evidence) -> Iterator[Violation]:
    for session_id, session in evidence.sessions.items():
        for what in session.contradictions:
            yield Violation(Invariant.PREFIX, f"session {session_id}: {what}")
        highest = max(session.acknowledged, default=0)
        if highest > len(session.sent):
            what = f"session {session_id}: {highest} acknowledged of {len(session.sent)} sent"
            yield Violation(Invariant.PREFIX, what)
        if any(later < earlier for earlier, later in itertools.pairwise(session.acknowledged)):
            yield Violation(Invariant.PREFIX, f"session {session_id}: an acknowledgement was taken back")
        on_disk = evidence.ledger.acknowledged.get(session_id, 0)
        if highest > on_disk:
            what = f"session {session_id}: {highest} acknowledged, {on_disk} on disk"
            yield Violation(Invariant.PREFIX, what)


def _check_digests(evidence: Evidence) -> Iterator[Violation]:
    if evidence.journal is None:
        return
    for version, digest in evidence.journal.versions:
        on_disk = evidence.ledger.versions.get(version)
        if on_disk != digest:
            what = f"version {version} was published as {digest[:12]}; the ledger has {str(on_disk)[:12]}"
            yield Violation(Invariant.ONE_DIGEST, what)


def _check_groups(evidence: Evidence) -> Iterator[Violation]:
    members: defaultdict[int, list[tuple[int, int | None]]] = defaultdict(list)
    for row in evidence.ledger.rows.values():
        if row.state == "trained":
            members[row.group_id].append((row.slot, row.step))
    for group_id, places in members.items():
        group = evidence.ledger.groups.get(group_id)
        slots = [slot for slot, _ in places]
        if group is None or len(set(slots)) != len(slots) or max(slots) >= group.num_slots:
            yield Violation(
                Invariant.WHOLE_GROUPS, f"group {group_id} was trained with slots {sorted(slots)}"
            )
        elif {step for _, step in places} != {group.step} or len(slots) < 2:
            what = f"group {group_id} of step {group.step} was trained in {_some(map(str, places))}"
            yield Violation(Invariant.WHOLE_GROUPS, what)


def _check_lag(evidence: Evidence, max_lag: int) -> Iterator[Violation]:
    for row in evidence.ledger.rows.values():
        if row.state != "trained" or row.step is None:
            continue
        lag = max(0, row.step - row.oldest_step)
        if lag > max_lag or lag != row.lag:
            what = f"{row.trajectory_id} has lag {lag} (recorded {row.lag}); the bound is {max_lag}"
            yield Violation(Invariant.BOUNDED_LAG, what)


def _check_order(evidence: Evidence) -> Iterator[Violation]:
    for before, after in itertools.pairwise(evidence.ledger.versions):
        follows = after.epoch == before.epoch and after.step == before.step + 1
        resumes = after.epoch > before.epoch and after.step <= before.step
        if not (follows or resumes):
            yield Violation(Invariant.MONOTONE, f"version {after} follows {before}")


def _check_tallies(evidence: Evidence) -> Iterator[Violation]:
    ledger = evidence.ledger
    if ledger.tallies.get("accepted", 0) != len(ledger.rows):
        what = f"{ledger.tallies.get('accepted', 0)} counted as accepted; {len(ledger.rows)} rows"
        yield Violation(Invariant.COUNTED, what)
    kinds = Counter(
        kind if kind != "rejected" else f"rejected:{code}"
        for session in evidence.sessions.values()
        for kind, code in session.verdicts.values()
    )
    for name, heard in kinds.items():
        if name not in _STORED and heard > ledger.tallies.get(name, 0):
            what = f"{heard} verdicts {name!r} were heard; {ledger.tallies.get(name, 0)} are counted"
            yield Violation(Invariant.COUNTED, what)


def _trained_by_step(evidence: Evidence) -> dict[int, frozenset[str]]:
    steps: defaultdict[int, set[str]] = defaultdict(set)
    for row in evidence.ledger.rows.values():
        if row.state == "trained" and row.step is not None:
            steps[row.step].add(row.trajectory_id)
    return {step: frozenset(names) for step, names in sorted(steps.items())}


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") or "nothing"
