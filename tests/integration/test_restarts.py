"""A learner's programs die one by one, or together; the rest goes on."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from learner.main import steps_done

from .cluster import Cluster, Program, cluster, wait_until
from .test_runs import check_balance


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    with cluster(tmp_path) as made:
        yield made


def child(learner: Program, module: str) -> psutil.Process:
    """The process of a learner that runs a module; waits for it to be there."""

    def find() -> psutil.Process | None:
        for process in psutil.Process(learner.process.pid).children(recursive=True):
            try:
                if module in process.cmdline():
                    return process
            except psutil.Error:
                continue
        return None

    found = wait_until(find, f"{module} to run")
    assert isinstance(found, psutil.Process)
    return found


def wait_for_metrics(run: Cluster, step: int) -> None:
    """Waits for a step without asking the coordinator, which may be away."""
    wait_until(lambda: steps_done(run.run_dir / "metrics.jsonl") >= step, f"step {step}")


def test_a_coordinator_that_dies_is_started_again_while_trainer_and_actors_stay(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=16)
    actor = run.actor("a1")
    trainer = child(learner, "learner.training")
    for step in (3, 8):
        wait_for_metrics(run, step)
        child(learner, "learner.coordinator").kill()
    assert learner.wait() == 0
    assert actor.wait() == 0
    check_balance(run, num_steps=16)
    assert "starting the trainer again" not in learner.output()
    assert not trainer.is_running()
    assert run.rows("SELECT epoch, step FROM lineages") == [(1, 0)], "the trainer kept its lineage"
    assert run.rows("SELECT count(*) FROM sessions") == [(3,)], "the actor joined again after each death"


@pytest.mark.slow
def test_trainer_and_coordinator_may_die_together(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=10)
    actor = run.actor("a1")
    wait_for_metrics(run, 4)
    for module in ("learner.training", "learner.coordinator"):
        child(learner, module).kill()
    assert learner.wait() == 0
    assert actor.wait() == 0
    check_balance(run, num_steps=10)
    lineages = dict(run.rows("SELECT epoch, step FROM lineages"))
    assert sorted(lineages) == [1, 2]
    assert lineages[2] >= 2, "training went on from a checkpoint"


def test_a_program_that_somebody_else_ends_in_order_is_started_again_too(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=12)
    actor = run.actor("a1")
    for step, module in ((3, "learner.training"), (7, "learner.coordinator")):
        wait_for_metrics(run, step)
        child(learner, module).terminate()
    assert learner.wait() == 0
    assert actor.wait() == 0
    check_balance(run, num_steps=12)
    assert "the trainer ended with status 0; starting it again" in learner.output()
    assert "the coordinator ended with status 0; starting it again" in learner.output()


def test_a_coordinator_that_cannot_start_ends_the_learner_with_its_reason(run: Cluster):
    run.environment("toy_environments:Letters")
    run.run_dir.mkdir()
    (run.run_dir / "ledger.sqlite").write_bytes(os.urandom(8192))
    run.write_config(num_steps=4)
    learner = run.start("learner", "learner", "run.toml")
    assert learner.wait() == 4
    assert "not a database" in learner.output()


def test_a_coordinator_that_starts_again_goes_on_while_an_environment_is_down(run: Cluster):
    environment = run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=4)
    environment.kill()
    child(learner, "learner.coordinator").kill()
    events = "SELECT message FROM events WHERE kind = 'environment'"
    ((message,),) = wait_until(lambda: run.rows(events), "the event")
    assert message.startswith(run.environments[0])
    run.start("again", "env", "serve", "toy_environments:Letters", "--bind", run.environments[0])
    run.actor("a1")
    assert learner.wait() == 0
    check_balance(run, num_steps=4)
