"""Actors that leave in mid-rollout, and a learner that stands still: real processes, real signals."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from learner.coordinator.audit import audit
from tests.integration.cluster import Cluster, cluster, wait_until


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    with cluster(tmp_path) as made:
        yield made


@pytest.mark.slow
def test_a_drained_actors_rollouts_are_gone_on_from_elsewhere(run: Cluster):
    """Every answer waits for its score when the actor is told to leave: none of it is sampled again."""
    gate = run.folder / "gate"
    run.environment("toy_environments:Gated", "--option", f"gate={gate}")
    learner = run.learner(num_steps=2)
    leaving = run.actor("leaving")

    def all_written() -> bool:
        """Its leases are all played, and wait for the environment."""
        actors = run.status().actors
        return bool(actors) and actors[0].num_leases > 0 and actors[0].stats.num_tokens > 0

    wait_until(all_written, "the actor to play")
    leaving.process.send_signal(signal.SIGTERM)
    assert leaving.wait() == 0
    handed_over = wait_until(lambda: run.status().num_handed_over, "partial rollouts to be kept")
    gate.touch()
    staying = run.actor("staying")
    wait_until(lambda: run.status().num_continued == handed_over, "leases that go on from them")
    assert learner.wait() == 0
    assert staying.wait() == 0
    assert "begins anew" not in staying.output()
    assert not audit(run.run_dir / "ledger.sqlite").violations
    assert run.totals().by_state["trained"] == 2 * 2 * 4
    drained = run.rows("SELECT count(*) FROM leases WHERE outcome = 'drained'")[0][0]
    assert drained >= handed_over


@pytest.mark.slow
def test_a_coordinator_that_stands_still_costs_nobody_a_lease(run: Cluster):
    run.environment("toy_environments:Letters")
    timing = ("--fleet.heartbeat_seconds", "0.5", "--fleet.suspect_seconds", "2", "--fleet.dead_seconds", "4")
    learner = run.learner(*timing, num_steps=40)
    actor = run.actor("a1")
    run.wait_for_step(2)
    coordinator = next(
        child
        for child in psutil.Process(learner.process.pid).children(recursive=True)
        if "learner.coordinator" in child.cmdline()
    )
    coordinator.suspend()
    # Longer than an actor may be silent.
    with pytest.raises(psutil.TimeoutExpired):
        coordinator.wait(timeout=8.0)
    coordinator.resume()
    assert learner.wait() == 0
    assert actor.wait() == 0
    events = [kind for (kind,) in run.rows("SELECT kind FROM events")]
    assert "stall" in events
    assert not {"dead", "expired", "lost"} & set(events)
    assert not audit(run.run_dir / "ledger.sqlite").violations
