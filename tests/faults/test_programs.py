"""The programs themselves, torch and all: environments that vanish, learners that are told to go, memory that ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from learner.coordinator.audit import audit

from ..integration.cluster import Cluster, cluster, wait_until
from .bench import Bench, until

MEBIBYTE = 1024 * 1024


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as made:
        yield made


def sound(run: Cluster, num_steps: int) -> None:
    """Every step is trained whole, and the ledger's invariants hold."""
    found = audit(run.run_dir / "ledger.sqlite")
    assert not found.violations, found.violations
    assert found.num_steps == num_steps
    assert found.totals.by_state["trained"] == num_steps * 2 * 4


@pytest.mark.slow
def test_an_environment_that_is_killed_and_comes_back_costs_retries_and_no_reward(run: Cluster):
    server = run.environment("toy_environments:Letters")
    address = server.wait_for_line("serving ").rpartition(" on ")[2]
    learner = run.learner("--fleet.infrastructure_budget", "100", num_steps=12)
    actor = run.actor("a1")
    run.wait_for_step(2)
    server.kill()

    def faults() -> int:
        return sum(each.infrastructure_faults for each in run.status().environments)

    wait_until(lambda: faults() > 0, "faults to be counted as the infrastructure's")
    reached = run.status().version.step
    again = ("env", "serve", "toy_environments:Letters", "--bind", address, "--workers", "1")
    run.start("env-again", *again).wait_for_line("serving ")
    assert learner.wait() == 0
    assert actor.wait() == 0
    assert reached < 12
    sound(run, 12)
    assert all(0.0 <= reward <= 1.0 for (reward,) in run.rows("SELECT reward FROM trajectories"))
    assert not run.rows("SELECT 1 FROM leases WHERE outcome = 'data'"), "nothing was held against the tasks"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGTERM twice", "SIGKILL of the supervisor alone"])
def test_a_learner_that_is_told_to_go_leaves_nothing_behind_and_resumes(run: Cluster, how: str):
    run.environment("toy_environments:Letters")
    learner = run.learner(num_steps=1000)
    actor = run.actor("a1")
    run.wait_for_step(3)
    programs = psutil.Process(learner.process.pid).children(recursive=True)
    if how.startswith("SIGKILL"):
        learner.process.kill()
    else:
        learner.process.send_signal(signal.SIGTERM)
    if how == "SIGTERM twice":
        wait_until(lambda: "draining" in learner.output(), "the first signal to be heard")
        learner.process.send_signal(signal.SIGTERM)
        assert learner.wait() == 128 + signal.SIGTERM
    elif how == "SIGTERM":
        assert learner.wait() == 0
        newest = audit(run.run_dir / "ledger.sqlite").newest
        assert newest is not None
        assert run.rows("SELECT max(step) FROM checkpoints") == [(newest[1],)], "nothing is to be made again"
    assert not psutil.wait_procs(programs, timeout=60)[1], "they end with their supervisor"
    reached = len((run.run_dir / "metrics.jsonl").read_text().splitlines())
    again = run.learner(num_steps=reached + 4, name="learner-again")
    assert again.wait() == 0
    assert actor.wait() == 0
    sound(run, reached + 4)


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[tuple[str, ...]]:
    """A command that runs another within a cgroup of so much memory. Skips where none may be made."""
    group = Path("/sys/fs/cgroup/memory/penstock-test")
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(num_bytes))
    except OSError as error:
        pytest.skip(f"no memory cgroup may be made here: {error}")
    try:
        yield ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


async def test_an_actor_that_runs_out_of_memory_is_a_dead_actor(tmp_path: Path):
    with memory_limit(400 * MEBIBYTE) as within:
        async with Bench(tmp_path, num_steps=6) as bench:
            await bench.start()
            options = ("--num-tokens", "1000", "--token-seconds", "0.02", "--hoard-bytes", str(8 * MEBIBYTE))
            hungry = bench.actor_process("hungry", *options, within=within)
            assert await hungry.end() in (-signal.SIGKILL, 128 + signal.SIGKILL)
            await until(lambda: bench.events("dead"), "it to be declared dead")
            bench.actor("heir")
            await bench.trained()
            bench.check()
            assert bench.rows("SELECT 1 FROM leases WHERE outcome = 'dead'")
