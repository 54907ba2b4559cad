"""`penstock replay` on a real run, whose trainer died on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cluster import Cluster, cluster
from .test_restarts import child, wait_for_metrics


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    with cluster(tmp_path) as made:
        yield made


def test_a_run_is_trained_again_to_equal_bits(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner("--ledger.keep_payloads", "True", num_steps=8)
    run.actor("a1")
    wait_for_metrics(run, 3)
    child(learner, "learner.training").kill()
    assert learner.wait() == 0
    assert run.rows("SELECT count(*) FROM lineages") == [(2,)]

    replay = run.start("replay", "replay", "run")
    assert replay.wait() == 0, replay.output()
    assert "to step 8: 9 versions have the digests that they had" in replay.output()

    last = Path("checkpoints/step-00000008/rank-0-of-1.safetensors")
    assert (run.run_dir / last).read_bytes() == (run.run_dir / "replay" / last).read_bytes()


@pytest.mark.slow
def test_a_replay_says_what_is_missing(run: Cluster):
    run.environment("toy_environments:Letters")
    learner = run.learner("--training.checkpoint.keep", "1", num_steps=5)
    run.actor("a1")
    assert learner.wait() == 0
    replay = run.start("replay", "replay", "run")
    assert replay.wait() == 2
    assert "Set `ledger.keep_payloads = true` before a run that is to be replayed" in replay.output()
