"""Whole runs whose versions are broadcast to actors in a group, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.coordinator.audit import audit
from penstock.v1 import operator_pb2

from .cluster import Cluster, cluster, wait_until

GROUP = (
    "--weights.medium",
    "collective",
    "--weights.stable_seconds",
    "0.5",
    "--weights.regroup_seconds",
    "1",
)


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    with cluster(tmp_path) as made:
        yield made


def broadcasts(run: Cluster) -> operator_pb2.BroadcastStatus:
    return run.status().broadcasts


def wait_for_members(run: Cluster, number: int) -> None:
    wait_until(lambda: broadcasts(run).num_members == number, f"a group of {number}")


def came_by_broadcast(run: Cluster) -> dict[str, int]:
    """Versions that each actor got so."""
    return {actor.actor_id: actor.weights.num_versions.get("broadcast", 0) for actor in run.status().actors}


@pytest.mark.slow
def test_actors_in_a_group_get_every_version_over_it_and_a_newcomer_is_taken_in(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner(*GROUP, num_steps=100_000)
    actors = [run.actor("a1")]
    wait_for_members(run, 1)
    before = run.status()
    run.wait_for_step(before.version.step + 10)
    after = run.status()
    assert after.broadcasts.num_broadcasts >= before.broadcasts.num_broadcasts + 9
    assert {actor.weights.medium for actor in after.actors} == {"broadcast"}
    actors.append(run.actor("a2"))
    wait_for_members(run, 2)
    wait_until(lambda: all(came_by_broadcast(run).values()), "a version to reach the newcomer so")
    assert not broadcasts(run).fallbacks, "nobody had to pull: the group made place for a larger one in order"
    assert [actor.interrupt() for actor in actors] == [0, 0]
    assert learner.interrupt() == 0
    assert not audit(run.run_dir / "ledger.sqlite").violations
    assert run.totals().imbalance == 0
