"""Every recipe of examples/ trains a tiny policy for a few steps, by its own command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.offline.main import main
from tests.tiny_policy import write_tiny_policy

from .cluster import cluster

EXAMPLES = Path(__file__).parents[2] / "examples"
LETTERS = "toy_environments:Letters"
SMALL = (
    "--schedule.num_steps", "2", "--schedule.groups_per_step", "2", "--schedule.group_size", "4",
    "--training.optimizer.learning_rate", "1e-3", "--training.device", "cpu",
)  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "environment", "max_tokens"),
    [
        ("grpo", LETTERS, 6),
        pytest.param("online_dpo", LETTERS, 6, marks=pytest.mark.slow),
        pytest.param("lora", LETTERS, 6, marks=pytest.mark.slow),
        pytest.param("dapo", LETTERS, 6, marks=pytest.mark.slow),
        pytest.param("multi_turn", "number_guessing:NumberGuessing", 16, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_of_a_run_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, environment: str, max_tokens: int
) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", f"{EXAMPLES / 'environments'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    with cluster(tmp_path) as run:
        served = run.environment(environment)
        address = served.wait_for_line("serving ").rpartition(" on ")[2]
        places = ("--policy", str(run.policy), "--run_dir", str(run.run_dir), "--environments", address)
        toml = str(EXAMPLES / f"{recipe}.toml")
        where = ("--bind", "127.0.0.1:0", "--sampling.max_tokens", str(max_tokens))
        learner = run.start("learner", "learner", toml, *places, *where, *SMALL)
        run.address = learner.wait_for_line("learner ready on ")
        run.actor("a1")
        assert learner.wait() == 0
        lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert all(math.isfinite(line["loss"]) for line in lines)
        assert all("ess" in line and "kl" in line for line in lines if line["grad_norm"])


@pytest.mark.parametrize(
    ("kind", "data"),
    [("sft", "completions"), ("sft", "conversations"), ("dpo", "pairs"), ("rm", "pairs")],
)
def test_a_recipe_from_files_trains(tmp_path: Path, kind: str, data: str) -> None:
    policy = write_tiny_policy(tmp_path / "policy")
    path = EXAMPLES / "data" / f"{data}.jsonl"
    toml = str(EXAMPLES / f"{kind}.toml")
    places = ["--policy", str(policy), "--data", str(path), "--out", str(tmp_path / "out")]
    assert main([kind, toml, *places, "--num_steps", "3", "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_run_in_one_file_trains() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "grpo_in_one_file.py"), "--steps", "5"],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 5: reward")
