"""Evaluations in the ledger: what a restart finds, and what the audit holds against it."""

from __future__ import annotations

import json
from pathlib import Path

import apsw
import pytest

from learner.coordinator.audit import audit
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.coordinator.evaluation.log import EvaluationLog
from learner.coordinator.evaluation.plan import EvaluationSource, Plan
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.ledger import Ledger, Recovered
from learner.coordinator.scheduler import Scheduler
from penstock.trajectory import PolicyVersion

from .fakes import (
    ENVIRONMENT,
    Submitter,
    acquire,
    digest_of,
    join,
    make_message,
    make_scheduler,
    restore,
    start,
)

CONFIG = EvaluationConfig(every_steps=1, num_prompts=3, samples_per_prompt=2)
PLAN = Plan(
    [EvaluationSource(environment=ENVIRONMENT, num_prompts=3)],
    samples=2,
    seed=1,
    sampling=CONFIG.sampling(16),
)
V0 = PolicyVersion(1, 0)


def begin(ledger: Ledger) -> tuple[Scheduler, Submitter]:
    scheduler = make_scheduler(history=ledger, evaluation=CONFIG, plan=PLAN)
    start(scheduler)
    return scheduler, Submitter(scheduler, join(scheduler))


def answer(scheduler: Scheduler, submit: Submitter, num_answers: int) -> None:
    """Of the questions that are free, four at a time."""
    while num_answers:
        leases = [lease for lease in acquire(scheduler, submit.session_id, V0, 1) if lease.pin is not None]
        for lease in leases:
            assert not submit(make_message(lease, V0)).code
        num_answers -= len(leases)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with a result, and a void evaluation after it."""
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    scheduler, submit = begin(ledger)
    answer(scheduler, submit, 6)
    scheduler.evaluations.published(PolicyVersion(1, 1), "later", 0.0)
    scheduler.evaluations.lineage_opened()
    ledger.write_blocking(scheduler.take_records())
    ledger.close()
    return path


def recovered(path: Path) -> Recovered:
    ledger = Ledger(path)
    try:
        return ledger.recover()
    finally:
        ledger.close()


def test_results_and_what_is_owed_are_found_again(path: Path):
    found = recovered(path).evaluations
    assert (found.next_number, found.open, found.owed) == (3, None, True)
    assert found.measured == {(digest_of(V0), PLAN.describe())}
    assert [json.loads(result)["num_answers"] for result in found.results] == [6]


def test_an_open_evaluation_is_found_again_with_its_answers_attempts_and_faults(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    scheduler, submit = begin(ledger)
    answer(scheduler, submit, 1)
    broken, held = (acquire(scheduler, submit.session_id, V0, 1)[0] for _ in range(2))
    submit.release(broken, LeaseOutcome.DATA, "broken")
    ledger.write_blocking(scheduler.take_records())
    found = ledger.recover()
    assert found.evaluations.open is not None
    assert found.evaluations.open.version == V0
    again = make_scheduler(history=ledger, evaluation=CONFIG, plan=PLAN)
    restore(again, found)
    again.evaluations.resume(V0, digest_of(V0), 0.0)
    assert again.evaluations.open is not None
    assert again.evaluations.open.num_answers == 1
    again.lineage.resume(V0)
    session = join(again, held=(held.lease_id,))
    newer = acquire(again, session, V0, 1)[0]
    assert (newer.slot, newer.attempt) == (broken.slot, 1), "its environment's session is fenced"
    assert Submitter(again, session)(make_message(held, V0)).state is not None, "the held one is adopted"
    ledger.close()


def test_the_file_of_results_is_written_anew_from_the_ledger(path: Path):
    file = path.parent / "evaluations.jsonl"
    file.write_text("garbage")
    EvaluationLog(path.parent).restore(recovered(path).evaluations.results)
    (line,) = file.read_text().splitlines()
    assert json.loads(line)["version"] == "1.0"


def test_an_answer_that_comes_after_its_evaluation_is_kept_as_surplus(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    scheduler, submit = begin(ledger)
    lease = acquire(scheduler, submit.session_id, V0, 1)[0]
    scheduler.evaluations.tick(CONFIG.deadline_seconds)
    ledger.write_blocking(scheduler.take_records())
    verdict = submit(make_message(lease, V0))
    assert verdict.state == "surplus"
    ledger.write_blocking(scheduler.take_records())
    ledger.close()
    assert not audit(tmp_path / "ledger.sqlite").violations


def test_a_sound_ledger_passes(path: Path):
    found = audit(path)
    assert not found.violations
    assert found.totals.accepted == 0, "answers are no trajectories of training"


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE evaluation_answers SET versions = '[[1, 0, 2], [1, 1, 1]]' WHERE slot = 0",
        "UPDATE evaluation_answers SET num_sampled = 4",
        "UPDATE evaluations SET step = 1 WHERE number = 1",
        "UPDATE evaluation_answers SET slot = 0, attempt = 0",
        "DELETE FROM evaluation_leases",
        "UPDATE evaluations SET num_slots = 2",
        "UPDATE evaluations SET state = 'open' WHERE number = 1",
        "DELETE FROM evaluation_answers WHERE slot = 1",
    ],
)
def test_what_contradicts_an_evaluation_is_found(path: Path, sql: str):
    db = apsw.Connection(str(path))
    db.execute(sql)
    assert db.changes()
    db.close()
    assert "I11" in audit(path).failed
