"""`penstock chaos` as a person starts it, for a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest


@pytest.mark.timeout(900)
def test_a_run_whose_programs_are_killed_for_a_minute_ends_by_itself_and_loses_nothing(
    tmp_path: Path,
) -> None:
    folder, results = tmp_path / "run", tmp_path / "chaos.json"
    command = [sys.executable, "-m", "penstock.cli", "chaos", "--minutes", "1", "--seed", "1"]
    options = ["--steps", "40", "--warm-start-steps", "20", "--run-dir", str(folder), "--json", str(results)]

    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=880)

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())["results"]
    assert found["kills"] > 0
    assert (found["lost"], found["trained_twice"], found["violations"], found["imbalance"]) == (0, 0, 0, 0)
    assert found["versions"] == 40
    # A slot whose rollouts failed too often while the environment was away is given up.
    assert 40 * 8 * 2 <= found["trained"] <= 40 * 8 * 16
    assert "back at work" in done.stdout
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])
    ]
