"""The checker finds what is planted, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.chaos.checker import Findings, Invariant, check
from penstock.chaos.evidence import (
    Evidence,
    LedgerEvidence,
    Row,
    SessionEvidence,
    gather,
    read_journal,
    read_sessions,
)
from penstock.errors import PenstockError
from penstock.history import History, read_history
from penstock.trajectory import PolicyVersion
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1.trajectory_pb2 import Trajectory


def row(name: str, *, group: int = 0, state: str = "trained", step: int | None = 0) -> Row:
    return Row(trajectory_id=name, group_id=group, state=state, step=step)


def sound() -> Evidence:
    """Two steps of a group of two each; one trajectory came too late."""
    rows = [
        row("a"), row("b"), row("c", group=1, step=1), row("d", group=1, step=1),
        row("late", state="surplus", step=None),
    ]  # fmt: skip
    session = SessionEvidence(
        sent=dict(enumerate(["a", "b", "", "c", "d", "late"], start=1)),
        acknowledged=[2, 3, 6],
        verdicts={
            **dict.fromkeys(range(1, 6), ("accepted", "")),
            6: ("surplus", ""),
        },
    )
    journal = [
        {"op": "open", "epoch": 1, "step": 0},
        {"op": "publish", "epoch": 1, "step": 0, "digest": "x"},
        {"op": "train", "epoch": 1, "step": 0, "groups": {"0": ["a", "b"]}},
        {"op": "publish", "epoch": 1, "step": 1, "digest": "y"},
        {"op": "train", "epoch": 1, "step": 1, "groups": {"1": ["d", "c"]}},
        {"op": "publish", "epoch": 1, "step": 2, "digest": "z"},
    ]
    return Evidence(
        ledger=LedgerEvidence(
            rows={each.trajectory_id: each for each in rows},
            versions={PolicyVersion(1, 0): "x", PolicyVersion(1, 1): "y", PolicyVersion(1, 2): "z"},
            tallies={"accepted": 5},
            acknowledged={"s": 6},
        ),
        sessions={"s": session},
        journal=read_journal(journal),
    )


def with_ledger(evidence: Evidence, **changes: object) -> Evidence:
    return dataclasses.replace(evidence, ledger=dataclasses.replace(evidence.ledger, **changes))  # type: ignore[arg-type]


def with_row(evidence: Evidence, changed: Row) -> Evidence:
    return with_ledger(evidence, rows={**evidence.ledger.rows, changed.trajectory_id: changed})


def broken(findings: Findings) -> set[Invariant]:
    return {violation.invariant for violation in findings.violations}


def test_a_sound_run_has_no_violations() -> None:
    findings = check(sound())
    assert not findings.violations
    assert (findings.accepted, findings.trained, findings.lost, findings.trained_twice) == (5, 4, 0, 0)
    assert findings.steps == {0: {"a", "b"}, 1: {"c", "d"}}


def lose_a_row(evidence: Evidence) -> Evidence:
    rows = {name: each for name, each in evidence.ledger.rows.items() if name != "late"}
    return with_ledger(evidence, rows=rows, tallies={"accepted": 4})


def train_twice(evidence: Evidence) -> Evidence:
    assert evidence.journal is not None
    evidence.journal.steps[1][1].append("a")
    return evidence


def train_another(evidence: Evidence) -> Evidence:
    assert evidence.journal is not None
    evidence.journal.steps[1] = {1: ["c", "e"]}
    return evidence


def take_an_acknowledgement_back(evidence: Evidence) -> Evidence:
    evidence.sessions["s"].acknowledged.append(4)
    return evidence


def acknowledge_the_future(evidence: Evidence) -> Evidence:
    evidence.sessions["s"].acknowledged.append(9)
    return evidence


def forget_an_acknowledgement(evidence: Evidence) -> Evidence:
    return with_ledger(evidence, acknowledged={"s": 5})


def mix_groups(evidence: Evidence) -> Evidence:
    assert evidence.journal is not None
    evidence.journal.steps[0] = {0: ["a"], 7: ["b"]}
    return evidence


def publish_two_digests(evidence: Evidence) -> Evidence:
    assert evidence.journal is not None
    evidence.journal.versions.append((PolicyVersion(1, 1), "other"))
    return evidence


def reject_without_counting(evidence: Evidence) -> Evidence:
    evidence.sessions["s"].verdicts[3] = ("rejected", "bad_mask")
    return evidence


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lose_a_row, Invariant.ACKNOWLEDGED_IS_KEPT),
        (train_twice, Invariant.TRAINED_ONCE),
        (train_another, Invariant.TRAINED_ONCE),
        (take_an_acknowledgement_back, Invariant.PREFIX),
        (acknowledge_the_future, Invariant.PREFIX),
        (forget_an_acknowledgement, Invariant.PREFIX),
        (mix_groups, Invariant.WHOLE_GROUPS),
        (publish_two_digests, Invariant.ONE_DIGEST),
        (reject_without_counting, Invariant.COUNTED),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_violation_is_found(plant: Callable[[Evidence], Evidence], expected: Invariant) -> None:
    assert expected in broken(check(plant(sound())))


def test_a_lost_trajectory_is_counted() -> None:
    assert check(lose_a_row(sound())).lost == 1


def test_an_answer_to_an_evaluation_is_kept_although_it_is_no_trajectory_of_training() -> None:
    evidence = sound()
    rows = {name: each for name, each in evidence.ledger.rows.items() if name != "late"}
    assert check(with_ledger(evidence, rows=rows)).lost == 1
    assert check(with_ledger(evidence, rows=rows, answers=frozenset({"late"}))).lost == 0


def test_a_trajectory_of_two_steps_is_counted() -> None:
    assert check(train_twice(sound())).trained_twice == 1


def test_what_was_sent_and_never_acknowledged_may_be_anywhere() -> None:
    evidence = sound()
    evidence.sessions["s"].sent[7] = "unknown"
    assert not check(evidence).violations


def test_a_duplicate_of_something_absent_is_lost_unless_its_rejection_went_unheard() -> None:
    evidence = sound()
    session = evidence.sessions["s"]
    session.sent[7], session.verdicts[7] = "absent", ("duplicate", "")
    session.acknowledged.append(7)
    counted = {"accepted": 5, "duplicate": 1}
    evidence = with_ledger(evidence, acknowledged={"s": 7}, tallies=counted)
    assert check(evidence).lost == 1
    assert check(with_ledger(evidence, tallies={**counted, "rejected:bad_mask": 1})).lost == 0


def test_a_new_lineage_makes_void_what_was_trained_after_its_checkpoint() -> None:
    journal = read_journal(
        [
            {"op": "open", "epoch": 1, "step": 0},
            {"op": "train", "epoch": 1, "step": 0, "groups": {"0": ["a"]}},
            {"op": "train", "epoch": 1, "step": 1, "groups": {"1": ["b"]}},
            {"op": "open", "epoch": 2, "step": 1},
            {"op": "train", "epoch": 2, "step": 1, "groups": {"1": ["b"]}},
        ]
    )
    assert journal.steps == {0: {0: ["a"]}, 1: {1: ["b"]}}


def test_a_history_is_read_as_it_was_written_but_for_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    history = History(path)
    trajectory = pb.SubmitItem(sequence=1, trajectory=Trajectory(trajectory_id="a").SerializeToString())
    release = pb.SubmitItem(sequence=2, release=pb.Release(lease_id="0.0.0"))
    history.invoke("s", [trajectory, release])
    verdict = pb.Verdict(sequence=1, kind=pb.VERDICT_KIND_REJECTED, code=pb.REJECTION_CODE_BAD_MASK)
    history.ok("s", pb.SubmitResponse(acknowledged=1, verdicts=[verdict]))
    history.unknown("s", "the stream broke")
    history.close()
    with path.open("ab") as file:
        file.write(b'{"op": "ok", "sess')
    assert list(read_history(path)) == [
        {"op": "invoke", "session": "s", "first": 1, "ids": ["a", ""]},
        {"op": "ok", "session": "s", "acknowledged": 1, "verdicts": [[1, "rejected", "bad_mask"]]},
        {"op": "unknown", "session": "s", "reason": "the stream broke"},
    ]


def test_a_sequence_number_that_means_two_things_is_found(tmp_path: Path) -> None:
    lines = [
        {"op": "invoke", "session": "s", "first": 1, "ids": ["a"]},
        {"op": "invoke", "session": "s", "first": 1, "ids": ["b", "c"]},
        {"op": "invoke", "session": "s", "first": 5, "ids": ["d"]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    session = read_sessions([path])["s"]
    assert session.contradictions == ["item 1 is both a and b", "item 5 follows 2"]


def test_a_ledger_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PenstockError, match=r"ledger\.sqlite"):
        gather(tmp_path, ())
