"""How often the supervisor starts a program again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from learner.config import RunConfig, ScheduleConfig
from learner.main import MOST_RESTARTS, Restarts, claim, end_of, steps_done
from penstock.errors import ConfigError, PenstockError
from penstock.processes import Child


def write_step(metrics: Path, step: int) -> None:
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")


def test_a_program_may_die_often_as_long_as_the_run_gets_on(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    restarts = Restarts("trainer", metrics)
    for step in range(1, 4 * MOST_RESTARTS):
        write_step(metrics, step)
        assert restarts.backoff(-9) == 0.5


def test_too_many_deaths_without_a_step_in_between_are_final(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    write_step(metrics, 7)
    restarts = Restarts("trainer", metrics)
    waits = []
    for _ in range(MOST_RESTARTS):
        # The same steps again, from the checkpoint, are no progress.
        write_step(metrics, 6)
        write_step(metrics, 7)
        waits.append(restarts.backoff(1))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0]
    with pytest.raises(PenstockError, match="the trainer died 6 times without a step in between"):
        restarts.backoff(1)


def test_a_torn_line_of_metrics_is_no_step(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    assert steps_done(metrics) == 0
    write_step(metrics, 3)
    with metrics.open("a") as file:
        file.write('{"step": 4')
    assert steps_done(metrics) == 3


def test_a_run_folder_is_one_learners_until_it_ends(tmp_path: Path):
    def settings(seed: int) -> RunConfig:
        return RunConfig(
            policy=tmp_path, environments=("localhost:1",), run_dir=tmp_path / "run", seed=seed,
            schedule=ScheduleConfig(num_steps=1),
        )  # fmt: skip

    written = tmp_path / "run" / "config.toml"
    with claim(settings(1)):
        first = written.read_text()
        with (
            pytest.raises(ConfigError, match="another learner is running in this folder"),
            claim(settings(2)),
        ):
            pass
        assert written.read_text() == first
    with claim(settings(2)):
        assert written.read_text() != first


async def python(code: str) -> Child:
    return await Child.start("child", [sys.executable, "-c", code])


async def test_a_program_that_does_not_listen_for_our_signal_ends_in_order_all_the_same():
    assert await end_of(await python("import time; time.sleep(60)"), grace_seconds=30.0) == 0


async def test_a_signal_that_was_not_ours_and_any_other_status_are_told():
    killed = await python("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    await killed.wait()
    assert await end_of(killed, grace_seconds=30.0) == -15
    listening = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "print('ready', flush=True)\n"
        "signal.pause()"
    )
    failed = await Child.start("child", [sys.executable, "-c", listening], capture=True)
    await failed.ready_line("ready", timeout_seconds=60.0)
    assert await end_of(failed, grace_seconds=30.0) == 3
