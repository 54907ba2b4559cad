"""Do a run's ledger, its actors' histories and its trainer's journal tell one story?

What the ledger alone can tell, `learner.coordinator.audit` checks; here it is held against
what others saw. Each function yields what contradicts one invariant. Pure: it looks at
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


class Invariant(StrEnum):
    ACKNOWLEDGED_IS_KEPT = "what was acknowledged is in the ledger"
    TRAINED_ONCE = "a step trained on what the ledger says, and nothing in two steps"
    PREFIX = "the acknowledgements of a session are a prefix of what it sent"
    ONE_DIGEST = "a version's digest is a function of its name"
    WHOLE_GROUPS = "a group was trained with its own trajectories"
    COUNTED = "the counters hold every verdict that was heard"


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


def check(evidence: Evidence) -> Findings:
    """All invariants at once."""
    lost = sorted(lost_ids(evidence))
    twice = sorted(trained_twice(evidence))
    violations = [
        *(Violation(Invariant.ACKNOWLEDGED_IS_KEPT, f"{name} is not in the ledger") for name in lost),
        *(Violation(Invariant.TRAINED_ONCE, f"{name} is in two steps") for name in twice),
        *_check_journal(evidence),
        *_check_prefix(evidence),
        *_check_digests(evidence),
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
            kept = name in evidence.ledger.rows or name in evidence.ledger.answers
            if name and kind != "rejected" and not kept:
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


def _check_journal(evidence: Evidence) -> Iterator[Violation]:
    """What the ledger says was trained is what the trainer trained on."""
    if evidence.journal is None:
        return
    for step, names in _trained_by_step(evidence).items():
        if step not in evidence.journal.steps and not evidence.journal.is_complete:
            continue
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
        # A publication that was refused is in no ledger.
        if on_disk is not None and on_disk != digest:
            what = f"version {version} was published as {digest[:12]}; the ledger has {on_disk[:12]}"
            yield Violation(Invariant.ONE_DIGEST, what)


def _check_tallies(evidence: Evidence) -> Iterator[Violation]:
    ledger = evidence.ledger
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
