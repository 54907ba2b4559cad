"""The learner is killed at each of its writes and syncs: nothing acknowledged is lost, nothing is trained twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import apsw
import pytest

from learner.coordinator.audit import audit

from .durable_loop import GROUP_SIZE, GROUPS_PER_STEP, NUM_STEPS, DurableLoop, trajectory_id

CHECKOUT = Path(__file__).parents[2]
# Syscalls on the ledger's file, its log and its segments, and about how many the writer's thread makes in a run
# (strace counts each thread's by itself).
DURABLE = {"fdatasync": 58, "pwrite64": 494, "writev": 20, "unlink": 3}
STRACE = ("strace", "-f", "-qq", "-o", "/dev/null")


def _can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run([*STRACE, "true"], check=False, capture_output=True).returncode == 0


needs_strace = pytest.mark.skipif(not _can_trace(), reason="strace is not installed, or may not trace")
pytestmark = needs_strace

Steps = dict[int, list[str]]


def run_loop(folder: Path, within: Sequence[str] = ()) -> int:
    """The exit status of a learner; negative, or above 128 from strace, if it was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*within, sys.executable, "-m", "tests.faults.durable_loop", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, -9, 137), done.stderr
    return done.returncode


def steps_of(folder: Path) -> Steps:
    db = apsw.Connection(str(folder / "ledger.sqlite"), flags=apsw.SQLITE_OPEN_READONLY)
    steps: Steps = {}
    for step, name in db.execute(
        "SELECT step, trajectory_id FROM trajectories WHERE state = 'trained' ORDER BY step, group_id, slot"
    ):
        steps.setdefault(step, []).append(name)
    db.close()
    return steps


def expected_steps() -> Steps:
    """Of a run that nothing disturbs: groups in order."""
    return {
        step: [
            trajectory_id(step * GROUPS_PER_STEP + group, slot)
            for group in range(GROUPS_PER_STEP)
            for slot in range(GROUP_SIZE)
        ]
        for step in range(NUM_STEPS)
    }


def check(folder: Path) -> None:
    found = audit(folder / "ledger.sqlite")
    assert not found.violations
    assert found.totals.imbalance == 0
    steps = steps_of(folder)
    assert steps == expected_steps()
    trained = {name for ids in steps.values() for name in ids}
    assert set(DurableLoop.acknowledged(folder)) <= trained


def kill_at(folder: Path, syscall: str, when: int) -> bool:
    """Kills a learner at its `when`-th call, then lets it finish; False if it had ended before."""
    killed = run_loop(
        folder, (*STRACE, "-e", f"trace={syscall}", "-e", f"inject={syscall}:signal=KILL:when={when}")
    )
    if killed:
        DurableLoop(folder).run()
    check(folder)
    return killed != 0


def test_an_undisturbed_run_trains_groups_in_order(tmp_path: Path):
    assert run_loop(tmp_path) == 0
    check(tmp_path)


@pytest.mark.parametrize("syscall", ["fdatasync", "pwrite64", "writev"])
@pytest.mark.parametrize(
    "share", [0.0, 0.3, 0.9, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.1, 0.5, 0.7))]
)
def test_a_learner_killed_at_a_durable_step_ends_with_the_same_steps(
    tmp_path: Path, syscall: str, share: float
):
    assert kill_at(tmp_path, syscall, 1 + int(share * DURABLE[syscall]))


def test_a_learner_killed_again_and_again_ends_with_the_same_steps(tmp_path: Path):
    deaths = 0
    for when in (9, 14, 23, 11, 30, 5):
        within = (*STRACE, "-e", "trace=fdatasync", "-e", f"inject=fdatasync:signal=KILL:when={when}")
        deaths += run_loop(tmp_path, within) != 0
    assert deaths
    DurableLoop(tmp_path).run()
    check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("syscall", "stride"), [("fdatasync", 1), ("pwrite64", 3), ("writev", 1), ("unlink", 1)]
)
def test_a_learner_killed_at_every_durable_step_ends_with_the_same_steps(
    tmp_path: Path, syscall: str, stride: int
):
    """A commit writes each page in two calls, so a stride of 3 hits every page, whole and torn.

    At a writev payloads are appended; at an unlink a segment goes that no row names any more.
    """
    when = 1
    while kill_at(tmp_path / str(when), syscall, when):
        shutil.rmtree(tmp_path / str(when))
        when += stride
    assert when > 0.9 * DURABLE[syscall]
