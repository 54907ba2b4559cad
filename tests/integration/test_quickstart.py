"""The quickstart as a person starts it, with so short a training that only its parts are tested."""

import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "penstock.cli", "quickstart", "--plain", "--warm-start-steps", "5"]


@pytest.mark.timeout(300)
def test_a_run_that_loses_an_actor_ends_with_a_summary_and_nothing_lost(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    done = subprocess.run(
        [*COMMAND, "--run-dir", str(folder), "--steps", "12", "--kill-an-actor"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed actor-1 with SIGKILL, and started actor-3" in done.stdout
    assert "held-out accuracy" in done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["versions"] == 12
    assert summary["killed_actor"] is True
    assert summary["engine"] == "torch"
    assert summary["ledger_imbalance"] == 0
    assert summary["max_lag_trained"] <= summary["max_lag"] == 4
    assert summary["trajectories"]["trained"] == 12 * 8 * 16
    assert 0 <= summary["accuracy_before"] <= 1
    assert 0 <= summary["accuracy_after"] <= 1
    assert summary["tokens_per_second"] > 0
    width, height = struct.unpack(">II", (folder / "reward.png").read_bytes()[16:24])
    assert (width, height) == (1200, 750)
    assert (folder / "policy" / "model.safetensors").is_file()


@pytest.mark.timeout(120)
def test_ctrl_c_stops_every_program(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [*COMMAND, "--run-dir", str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as quickstart:
        assert quickstart.stdout is not None
        for line in quickstart.stdout:
            if "version" in line:
                break
        quickstart.send_signal(signal.SIGINT)
        said = quickstart.stdout.read()

    assert "stopped before the end" in said
    assert quickstart.returncode == 130
    assert [process for process in psutil.process_iter(["cmdline"]) if str(folder) in _command(process)] == []


def _command(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())


def test_a_folder_in_use_is_status_2(tmp_path: Path) -> None:
    (tmp_path / "something").touch()

    done = subprocess.run([*COMMAND, "--run-dir", str(tmp_path)], capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert "Traceback" not in done.stderr
