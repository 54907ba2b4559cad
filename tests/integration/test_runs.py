"""Whole runs: environment, learner and actors started by hand, in processes of their own."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from learner.coordinator.audit import audit
from penstock.v1 import operator_pb2
from tests.ipv6 import needs_ipv6

from .cluster import Cluster, cluster, wait_until


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    with cluster(tmp_path) as made:
        yield made


def check_balance(run: Cluster, *, num_steps: int, max_lag: int = 2) -> None:
    assert not audit(run.run_dir / "ledger.sqlite").violations
    totals = run.totals()
    assert totals.imbalance == 0
    assert totals.max_lag_trained <= max_lag
    assert totals.by_state["trained"] == num_steps * 2 * 4
    steps = run.rows("SELECT step, count(*) FROM groups WHERE state = 'trained' GROUP BY step ORDER BY step")
    assert steps == [(step, 2) for step in range(num_steps)]
    assert not run.rows("SELECT 1 FROM trajectories WHERE state = 'pending'")


def test_a_run_goes_from_start_to_finish(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=6)
    actors = [run.actor("a1"), run.actor("a2")]
    assert learner.wait() == 0
    assert [actor.wait() for actor in actors] == [0, 0]
    check_balance(run, num_steps=6)
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["lag_max"] <= 2 for line in lines)


@needs_ipv6
def test_a_run_goes_over_ipv6(run: Cluster):
    run.environment("toy_environments:Letters", "--bind", "[::1]:0")
    learner = run.learner("--bind", "[::1]:0", "--metrics-bind", "[::1]:0", num_steps=2)
    assert run.environments[0].startswith("[::1]:")
    assert run.address.startswith("[::1]:")
    actor = run.actor("a1", "--bind", "[::1]:0")
    assert (learner.wait(), actor.wait()) == (0, 0)
    check_balance(run, num_steps=2)


@pytest.mark.slow
def test_max_lag_zero_is_the_synchronous_mode(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner("--schedule.max_lag", "0", num_steps=4)
    run.actor("a1")
    assert learner.wait() == 0
    check_balance(run, num_steps=4, max_lag=0)
    assert run.totals().mixed_version_trained == 0


@pytest.mark.slow
def test_a_killed_actor_costs_nothing_and_another_takes_over(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=12)
    victim = run.actor("a1")
    run.wait_for_step(2)
    victim.kill()
    late = run.actor("a2")
    assert learner.wait() == 0
    assert late.wait() == 0
    check_balance(run, num_steps=12)
    by_actor = run.rows(
        "SELECT actor_id, count(*) FROM trajectories JOIN sessions USING (session_id) GROUP BY actor_id"
    )
    assert {name for name, _ in by_actor} == {"a1", "a2"}


def test_a_learner_started_again_resumes_and_actors_come_back_by_themselves(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=40)
    actor = run.actor("a1")
    run.wait_for_step(3)
    assert learner.interrupt() == 0
    reached = len((run.run_dir / "metrics.jsonl").read_text().splitlines())
    assert 3 <= reached < 40
    again = run.learner(num_steps=reached + 4, name="learner-again")
    assert again.wait() == 0
    assert actor.wait() == 0
    check_balance(run, num_steps=reached + 4)
    epochs = [epoch for (epoch,) in run.rows("SELECT DISTINCT epoch FROM versions ORDER BY epoch")]
    assert epochs == [1, 2]


@pytest.mark.slow
def test_a_killed_learner_trains_each_trajectory_once(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=40)
    run.actor("a1")
    run.wait_for_step(5)
    for child in psutil.Process(learner.process.pid).children(recursive=True):
        child.kill()
    learner.kill()
    again = run.learner(num_steps=8, name="learner-again")
    assert again.wait() == 0
    check_balance(run, num_steps=8)


@pytest.mark.slow
def test_a_trainer_that_dies_is_started_again_while_all_else_stays(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=30)
    actor = run.actor("a1")
    run.wait_for_step(3)
    trainer = next(
        child
        for child in psutil.Process(learner.process.pid).children(recursive=True)
        if "learner.training" in child.cmdline()
    )
    trainer.kill()
    assert learner.wait() == 0
    assert actor.wait() == 0
    check_balance(run, num_steps=30)
    assert run.rows("SELECT count(*) FROM sessions") == [(1,)], "the actor's session outlived the trainer"


@pytest.mark.slow
def test_ctrl_c_drains_every_process(run: Cluster):
    environment = run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=10_000)
    actor = run.actor("a1")
    run.wait_for_step(1)
    assert actor.interrupt() == 0
    wait_until(lambda: not run.status().actors, "the actor to be gone")
    assert learner.interrupt() == 0
    assert environment.interrupt() == 0
    outcomes = dict(run.rows("SELECT outcome, count(*) FROM leases GROUP BY outcome"))
    assert None not in outcomes, "every lease of the drained actor was returned"
    assert run.totals().imbalance == 0


@pytest.mark.slow
def test_two_ranks_train_a_run(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner("--training.num_ranks", "2", num_steps=4)
    run.actor("a1")
    assert learner.wait() == 0
    check_balance(run, num_steps=4)


OTHER_HOST = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh")
"""Runs a command whose shared memory is not ours, as on another host."""


@pytest.mark.skipif(
    subprocess.run([*OTHER_HOST, "true"], capture_output=True, check=False).returncode != 0,
    reason="this user may not make mount namespaces",
)
def test_an_actor_without_the_learners_shared_memory_takes_weights_over_zeromq(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=4)
    actor = run.actor("elsewhere", within=OTHER_HOST)
    assert learner.wait() == 0
    assert actor.wait() == 0
    assert "over SharedMemoryMedium" in actor.output(), "the log says why the first medium was not taken"
    check_balance(run, num_steps=4)


def test_nothing_listens_beyond_loopback(run: Cluster):
    run.environment("toy_environments:Letters")
    run.learner(num_steps=10_000)
    run.actor("a1")
    run.wait_for_step(1)
    ours = psutil.Process(os.getpid()).children(recursive=True)
    connections = itertools.chain.from_iterable(child.net_connections(kind="inet") for child in ours)
    listening = {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize(
    "how",
    ["nan", *(pytest.param(how, marks=pytest.mark.slow) for how in ("hang", "crash", "raise", "nothing"))],
)
def test_a_broken_environment_is_counted_and_holds_nobody_else_up(run: Cluster, how: str):
    run.environment("toy_environments:Letters")
    run.environment("toy_environments:Faulty", "--option", f"how={how}", "--scorer-seconds", "1")
    budgets = ("--fleet.infrastructure_budget", "1", "--fleet.data_budget", "1")
    learner = run.learner(*budgets, num_steps=2)
    actor = run.actor("a1")

    def faults() -> operator_pb2.EnvironmentStatus | None:
        found = next(e for e in run.status().environments if e.name == f"faulty_{how}")
        return found if found.infrastructure_faults + found.data_faults else None

    wait_until(faults, "a fault to be counted")
    assert learner.wait() == 0
    assert actor.wait() == 0
    totals = run.totals()
    assert totals.imbalance == 0
    assert set(totals.by_environment) == {"letters"}, "no reward was invented for the broken one"
    assert totals.by_state["trained"] == 2 * 2 * 4
