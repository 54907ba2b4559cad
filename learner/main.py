"""`penstock learner RUN.toml`: starts the coordinator and the trainer, and keeps them.

    penstock learner (this process, no torch)
      ├── python -m learner.coordinator   gRPC, ledger, weights server
      └── python -m learner.training      one process a rank

A trainer that dies is started again and resumes from its newest checkpoint, while the
coordinator and the actors stay. When the coordinator dies the learner ends; the same
command resumes the run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
from collections.abc import Sequence

import uvloop

from learner.config import RunConfig
from learner.training.launch import launch_command
from penstock import config, log
from penstock.errors import ConfigError, PenstockError, TrainingDiverged
from penstock.policy_files import read_policy_folder
from penstock.processes import Child
from penstock.signals import Stop
from penstock.tasks import unless_stopped

_log = logging.getLogger(__name__)

MAX_TRAINER_RESTARTS = 3
_COORDINATOR_START_SECONDS = 120.0
_TRAINER_GRACE_SECONDS = 7.0
_COORDINATOR_GRACE_SECONDS = 4.0
_FAREWELL_SECONDS = 20.0
_FINAL = (0, ConfigError.exit_status, TrainingDiverged.exit_status)
"""Exit statuses of a trainer that need no second try."""


def main(argv: Sequence[str]) -> int:
    log.configure()
    settings = config.load(RunConfig, argv, prog="penstock learner", description=__doc__ or "")
    settings = dataclasses.replace(
        settings, policy=settings.policy.resolve(), run_dir=settings.run_dir.resolve()
    )
    read_policy_folder(settings.policy)
    return uvloop.run(_supervise(settings))


async def _supervise(settings: RunConfig) -> int:
    stop = Stop()
    stop.on_signals()
    _write_config(settings)
    path = str(settings.run_dir / "config.toml")
    coordinator = await Child.start(
        "coordinator", [sys.executable, "-m", "learner.coordinator", path], capture=True
    )
    try:
        address = await unless_stopped(
            coordinator.ready_line("coordinator ready on", timeout_seconds=_COORDINATOR_START_SECONDS),
            stop,
            name="coordinator's start",
        )
        if address is None:
            return 0 if stop.is_set() else await coordinator.wait()
        print(f"learner ready on {address}", flush=True)  # noqa: T201
        status = await _train(settings, address, coordinator, stop)
        if status == 0 and not stop.is_set():
            await _farewell(coordinator)
    finally:
        coordinator_status = await coordinator.stop(grace_seconds=_COORDINATOR_GRACE_SECONDS)
    return status or coordinator_status


def _write_config(settings: RunConfig) -> None:
    """The resolved configuration, for every process of the run. Raises ConfigError."""
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        (settings.run_dir / "config.toml").write_text(config.to_toml(settings), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir {settings.run_dir} cannot be written: {error}") from error


async def _train(settings: RunConfig, address: str, coordinator: Child, stop: Stop) -> int:
    """Runs the trainer, again if it dies, until it is done, or anything else ends."""
    arguments = [str(settings.run_dir), "--coordinator", address]
    command = launch_command(
        module="learner.training", arguments=arguments, num_ranks=settings.training.num_ranks
    )
    for attempt in range(MAX_TRAINER_RESTARTS + 1):
        if attempt:
            _log.warning("starting the trainer again (%d of %d)", attempt, MAX_TRAINER_RESTARTS)
        trainer = await Child.start("trainer", command)
        try:
            await _first_to_end(trainer, coordinator, stop)
            if coordinator.status == 0:
                # It ends by itself only after the run: the trainer is on its way out too.
                await trainer.wait_at_most(_TRAINER_GRACE_SECONDS)
        finally:
            status = await trainer.stop(grace_seconds=_TRAINER_GRACE_SECONDS)
        if stop.is_set() or status in _FINAL:
            return status
        if coordinator.status is not None:
            raise PenstockError(
                f"the coordinator ended with status {coordinator.status}; its log says why. Start the learner "
                "again with the same command to resume"
            )
        _log.error("the trainer ended with status %d", status)
    raise PenstockError(f"the trainer failed {MAX_TRAINER_RESTARTS + 1} times; its log says why")


async def _first_to_end(trainer: Child, coordinator: Child, stop: Stop) -> None:
    waits = [
        asyncio.create_task(trainer.wait(), name="trainer"),
        asyncio.create_task(coordinator.wait(), name="coordinator"),
        asyncio.create_task(stop.wait(), name="stop"),
    ]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)


async def _farewell(coordinator: Child) -> None:
    """The run is finished: the coordinator sends the actors home, and ends by itself."""
    if not await coordinator.wait_at_most(_FAREWELL_SECONDS):
        _log.warning("the coordinator still runs %.0f s after the run's end; stopping it", _FAREWELL_SECONDS)
