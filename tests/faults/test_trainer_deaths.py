"""The real trainer dies in the midst of a step, a checkpoint or a publication: the run comes to the same weights."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from learner.config import ScheduleConfig
from learner.coordinator.audit import audit
from learner.training.config import CheckpointConfig, Device, TrainingConfig
from penstock.chaos.checker import check
from penstock.chaos.evidence import Evidence, gather, read_metrics
from penstock.quickstart.policy import make_policy

from .bench import RESTART_FLEET, Bench, Process
from .dying_trainer import POINTS

TRAINING = TrainingConfig(device=Device.CPU, checkpoint=CheckpointConfig(every_steps=2, keep=2))
STEPS_A_DEATH = 5


def start_trainer(bench: Bench, *, dying: str | None) -> Process:
    module = ["learner.training"] if dying is None else ["tests.faults.dying_trainer", dying]
    command = [sys.executable, "-m", *module, str(bench.run_dir), "--coordinator", bench.address]
    bench.trainer = bench.process("trainer", command)
    return bench.trainer


async def run(folder: Path, points: Sequence[str], num_steps: int) -> Bench:
    """A run whose trainer dies at each of the points, one after another."""
    bench = Bench(folder, num_steps=num_steps, max_lag=0, fleet=RESTART_FLEET, training=TRAINING)
    async with bench:
        make_policy(
            folder / "policy",
            seed=0,
            characters="abcdefghijklm",
            hidden_size=32,
            num_layers=1,
            intermediate_size=64,
            head_dim=16,
        )
        await bench.start_coordinator()
        bench.actor("a1")
        for point in points:
            assert await start_trainer(bench, dying=point).end() == -signal.SIGKILL, bench.logs()
        start_trainer(bench, dying=None)
        await bench.trained()
    return bench


def assert_sound(bench: Bench, schedule: ScheduleConfig) -> None:
    found = audit(bench.run_dir / "ledger.sqlite")
    assert not found.violations, found.violations
    evidence = gather(bench.run_dir, sorted((bench.folder / "histories").glob("*.jsonl")))
    journal = read_metrics(bench.run_dir / "metrics.jsonl", evidence.ledger)
    findings = check(Evidence(ledger=evidence.ledger, sessions=evidence.sessions, journal=journal))
    assert not findings.violations, findings.violations
    assert groups_by_step(bench) == [
        (group // schedule.groups_per_step, group)
        for group in range(schedule.num_steps * schedule.groups_per_step)
    ]
    assert not list((bench.run_dir / "checkpoints").glob(".*.writing")), "halves of checkpoints are removed"


def groups_by_step(bench: Bench) -> list[tuple[int, int]]:
    return bench.rows("SELECT step, group_id FROM groups WHERE state = 'trained' ORDER BY step, group_id")


def digests(bench: Bench) -> list[tuple[int, str]]:
    """Of every step's weights, however often it was made: one digest a step if all are the same."""
    return bench.rows("SELECT DISTINCT step, digest FROM versions ORDER BY step")


async def test_a_trainer_that_dies_before_a_checkpoint_has_its_name_makes_the_same_versions_again(
    tmp_path: Path,
):
    bench = await run(tmp_path, ["before a checkpoint's rename"], num_steps=6)
    assert_sound(bench, bench.schedule)
    assert bench.rows("SELECT step FROM lineages ORDER BY epoch") == [(0,), (2,)]
    assert [step for step, _ in digests(bench)] == list(range(7)), "two lineages made versions 2 to 4 alike"


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_trainer_that_dies_at_every_point_of_its_work_makes_the_weights_of_one_that_does_not(
    tmp_path: Path,
):
    num_steps = STEPS_A_DEATH * len(POINTS)
    disturbed = await run(tmp_path / "disturbed", list(POINTS), num_steps)
    assert_sound(disturbed, disturbed.schedule)
    assert len(disturbed.rows("SELECT 1 FROM lineages")) == len(POINTS) + 1
    undisturbed = await run(tmp_path / "undisturbed", [], num_steps)
    assert_sound(undisturbed, undisturbed.schedule)
    assert digests(disturbed) == digests(undisturbed)
    assert len(digests(undisturbed)) == num_steps + 1
