"""What a run left behind, read for the checker: its ledger, histories, and the trainer's journal.

The journal has a line for each thing that a trainer did:

    {"op": "open", "epoch": 2, "step": 4}
    {"op": "train", "epoch": 2, "step": 4, "groups": {"17": ["0a...", ...], ...}}
    {"op": "publish", "epoch": 2, "step": 5, "digest": "..."}
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from penstock.errors import PenstockError
from penstock.history import read_history
from penstock.trajectory import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trajectory in the ledger."""

    trajectory_id: str
    group_id: int
    state: str
    step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEvidence:
    rows: Mapping[str, Row] = field(default_factory=dict)
    """By trajectory id."""
    answers: frozenset[str] = frozenset()
    """Trajectory ids of evaluations, which never train."""
    versions: Mapping[PolicyVersion, str] = field(default_factory=dict)
    """Digest of each, in order."""
    tallies: Mapping[str, int] = field(default_factory=dict)
    acknowledged: Mapping[str, int] = field(default_factory=dict)
    """The last sequence number that was decided upon, by session."""


@dataclass(slots=True)
class SessionEvidence:
    """One session as its actor saw it."""

    sent: dict[int, str] = field(default_factory=dict)
    """Trajectory by sequence number; "" for a release."""
    contradictions: list[str] = field(default_factory=list)
    """Sequence numbers that were used for two things, or skipped."""
    acknowledged: list[int] = field(default_factory=list)
    verdicts: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Kind and code by sequence number."""


@dataclass(slots=True)
class Journal:
    """What trainers did, as they wrote it down."""

    steps: dict[int, dict[int, list[str]]] = field(default_factory=dict)
    """Of the surviving lineage: trajectories by group, by step."""
    versions: list[tuple[PolicyVersion, str]] = field(default_factory=list)
    is_complete: bool = True
    """Every step that was trained is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    ledger: LedgerEvidence = field(default_factory=LedgerEvidence)
    sessions: Mapping[str, SessionEvidence] = field(default_factory=dict)
    journal: Journal | None = None


def gather(run_dir: Path, histories: Iterable[Path], journal: Path | None = None) -> Evidence:
    """Reads it all, while nothing of the run is alive. Raises PenstockError."""
    return Evidence(
        ledger=read_ledger(run_dir / "ledger.sqlite"),
        sessions=read_sessions(histories),
        journal=None if journal is None else read_journal(read_history(journal)),
    )


def read_sessions(histories: Iterable[Path]) -> dict[str, SessionEvidence]:
    """By session id. Raises PenstockError."""
    sessions: dict[str, SessionEvidence] = {}
    for path in histories:
        for line in read_history(path):
            _add_line(sessions.setdefault(line["session"], SessionEvidence()), line)
    return sessions


def read_ledger(path: Path) -> LedgerEvidence:
    """Raises PenstockError."""
    try:
        db: Any = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        rows = db.execute("SELECT trajectory_id, group_id, state, step FROM trajectories").fetchall()
        answers = db.execute("SELECT trajectory_id FROM evaluation_answers").fetchall()
        versions = db.execute("SELECT epoch, step, digest FROM versions ORDER BY epoch, step").fetchall()
        tallies = db.execute("SELECT name, value FROM tallies").fetchall()
        sessions = db.execute("SELECT session_id, acknowledged FROM sessions").fetchall()
    except apsw.Error as error:
        raise PenstockError(f"{path}: cannot be read: {error}") from error
    names = ("trajectory_id", "group_id", "state", "step")
    return LedgerEvidence(
        rows={row[0]: Row(**dict(zip(names, row, strict=True))) for row in rows},
        answers=frozenset(name for (name,) in answers),
        versions={PolicyVersion(epoch, step): digest for epoch, step, digest in versions},
        tallies=dict(tallies),
        acknowledged=dict(sessions),
    )


def read_journal(lines: Iterable[Mapping[str, Any]]) -> Journal:
    """Opening a lineage at step S makes void what was trained from S on."""
    journal = Journal()
    for line in lines:
        step = line["step"]
        if line["op"] == "open":
            journal.steps = {past: ids for past, ids in journal.steps.items() if past < step}
        elif line["op"] == "train":
            journal.steps[step] = {int(group): list(ids) for group, ids in line["groups"].items()}
        else:
            journal.versions.append((PolicyVersion(line["epoch"], step), line["digest"]))
    return journal


def read_metrics(path: Path, ledger: LedgerEvidence) -> Journal:
    """What the trainer's metrics.jsonl says of which groups it trained on.

    A line is written after its version is published: a crash between leaves a step out.
    """
    members: defaultdict[int, list[str]] = defaultdict(list)
    for row in ledger.rows.values():
        if row.state == "trained":
            members[row.group_id].append(row.trajectory_id)
    journal = Journal(is_complete=False)
    for line in read_history(path):
        # A later line of a step is of a later lineage, which made the earlier one void.
        journal.steps[line["step"] - 1] = {group_id: members[group_id] for group_id in line["groups"]}
    return journal


def _add_line(session: SessionEvidence, line: Mapping[str, Any]) -> None:
    if line["op"] == "invoke":
        for sequence, trajectory_id in enumerate(line["ids"], start=line["first"]):
            known = session.sent.get(sequence)
            if known is None and sequence != len(session.sent) + 1:
                session.contradictions.append(f"item {sequence} follows {len(session.sent)}")
            elif known not in (None, trajectory_id):
                session.contradictions.append(f"item {sequence} is both {known} and {trajectory_id}")
            session.sent[sequence] = trajectory_id
    elif line["op"] == "ok":
        session.acknowledged.append(line["acknowledged"])
        for sequence, kind, code in line["verdicts"]:
            session.verdicts.setdefault(sequence, (kind, code))
