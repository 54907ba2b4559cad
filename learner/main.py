"""`penstock learner RUN.toml`: starts the coordinator and the trainer, and keeps them.

    penstock learner (this process, no torch)
      ├── python -m learner.coordinator   gRPC, ledger, weights server
      └── python -m learner.training      one process a rank

Either may die while the other and the actors stay: it is started again, and goes on. A
trainer resumes from its newest checkpoint; a coordinator takes up the ledger on the same
port, and the trainer's calls wait for it. Deaths without a step in between are counted,
and too many of them end the learner; the same command resumes the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import apsw
import uvloop

from learner.config import RunConfig
from learner.coordinator.database import open_reader
from learner.training.launch import launch_command
from penstock import config, log
from penstock.errors import ConfigError, LedgerError, PenstockError, TrainingDiverged
from penstock.policy_files import read_policy_folder
from penstock.processes import Child
from penstock.signals import Stop
from penstock.tasks import unless_stopped
from penstock.weights.file_locks import try_open_lock

_log = logging.getLogger(__name__)

MOST_RESTARTS = 5
"""Of one program, without a step in between."""
_BACKOFF_SECONDS = (0.5, 10.0)
_COORDINATOR_START_SECONDS = 120.0
_TRAINER_GRACE_SECONDS = 7.0
_COORDINATOR_GRACE_SECONDS = 4.0
_FAREWELL_SECONDS = 20.0
_FINAL = (ConfigError.exit_status, TrainingDiverged.exit_status, LedgerError.exit_status)
"""Exit statuses that need no second try."""
_TAIL_BYTES = 64 * 1024


def main(argv: Sequence[str]) -> int:
    log.configure()
    settings = config.load(RunConfig, argv, prog="penstock learner", description=__doc__ or "")
    settings = dataclasses.replace(
        settings, policy=settings.policy.resolve(), run_dir=settings.run_dir.resolve()
    )
    read_policy_folder(settings.policy)
    status = uvloop.run(_supervise(settings))
    return status if status >= 0 else 128 - status


async def _supervise(settings: RunConfig) -> int:
    stop = Stop()
    stop.on_signals()
    with claim(settings):
        programs = _Programs(settings, stop)
        try:
            if await programs.start():
                await programs.keep()
        finally:
            status = await programs.end()
    return status


@contextlib.contextmanager
def claim(settings: RunConfig) -> Iterator[None]:
    """Holds the run's folder against other learners, and writes the resolved configuration into it.

    Every process of the run reads it, also one that is started again. Raises ConfigError.
    """
    folder, name = settings.run_dir, "config.toml"
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = try_open_lock(folder / "learner.lock")
            if lock is None:
                raise ConfigError(f"{folder}: another learner is running in this folder; stop it first")
            held.callback(os.close, lock)
            aside = folder / f".{name}"
            aside.write_text(config.to_toml(settings), encoding="utf-8")
            aside.replace(folder / name)
        except OSError as error:
            raise ConfigError(f"run_dir {folder} cannot be written: {error}") from error
        yield


class Restarts:
    """Lets a program be started again, after a while, unless it died too often without a step in between."""

    def __init__(self, name: str, metrics: Path) -> None:
        """metrics: the run's metrics.jsonl; its last step tells whether the run gets on."""
        self._name = name
        self._metrics = metrics
        self._furthest = steps_done(metrics)
        self._count = 0

    def backoff(self, status: int) -> float:
        """Seconds to wait before the next start. Raises PenstockError when it was one death too many."""
        step = steps_done(self._metrics)
        if step > self._furthest:
            self._furthest, self._count = step, 0
        self._count += 1
        if self._count > MOST_RESTARTS:
            raise PenstockError(
                f"the {self._name} died {self._count} times without a step in between, the last time with "
                f"status {status}; its log says why. Start the learner again with the same command to resume"
            )
        first, most = _BACKOFF_SECONDS
        seconds: float = min(first * 2 ** (self._count - 1), most)
        _log.error(
            "the %s ended with status %d; starting it again in %.1f s (%d of %d)",
            self._name, status, seconds, self._count, MOST_RESTARTS,
        )  # fmt: skip
        return seconds


def steps_done(metrics: Path) -> int:
    """The step in the last whole line of a metrics file; 0 if there is none, or a crash tore it."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES), os.SEEK_SET)
        lines = file.read().split(b"\n")[:-1]
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (ValueError, KeyError):
        return 0


def is_finished(run_dir: Path) -> bool:
    """Whether the ledger says that all steps are trained. False if it cannot be read: its coordinator says why."""
    try:
        with contextlib.closing(open_reader(run_dir / "ledger.sqlite")) as db:
            return bool(db.execute("SELECT 1 FROM meta WHERE name = 'finished'").fetchall())
    except apsw.Error:
        return False


class _Programs:
    """The coordinator and the trainer."""

    def __init__(self, settings: RunConfig, stop: Stop) -> None:
        self._settings = settings
        self._stop = stop
        self._bind = settings.bind
        metrics = settings.run_dir / "metrics.jsonl"
        self._coordinator_restarts = Restarts("coordinator", metrics)
        self._trainer_restarts = Restarts("trainer", metrics)
        self._coordinator: Child | None = None
        self._trainer: Child | None = None

    async def start(self) -> bool:
        """False if there is nothing to keep: a stop came first, or the coordinator cannot run."""
        if not await self._start_coordinator():
            return False
        print(f"learner ready on {self._bind}", flush=True)  # noqa: T201
        await self._start_trainer()
        return True

    async def keep(self) -> None:
        """Starts again what dies, until the run is done, something is final, or a stop. Raises PenstockError."""
        while True:
            assert self._coordinator is not None
            assert self._trainer is not None
            await _first_to_end(self._trainer, self._coordinator, self._stop)
            coordinator, trainer = self._coordinator.status, self._trainer.status
            if self._stop.is_set() or trainer in _FINAL or coordinator in _FINAL:
                return
            # In order, and yet not at the end: somebody else's signal.
            if 0 in (trainer, coordinator) and await asyncio.to_thread(is_finished, self._settings.run_dir):
                return
            if coordinator is not None:
                if not await self._stop.sleep(self._coordinator_restarts.backoff(coordinator)):
                    await self._start_coordinator()
            elif trainer is not None and not await self._stop.sleep(self._trainer_restarts.backoff(trainer)):
                await self._start_trainer()

    async def end(self) -> int:
        """Stops what runs, the trainer first. Returns the learner's exit status."""
        if self._coordinator is None:
            return 0
        status, is_complete = 0, False
        if self._trainer is not None:
            is_complete = await self._is_complete(self._trainer, self._coordinator)
            status = await end_of(self._trainer, grace_seconds=_TRAINER_GRACE_SECONDS)
            if is_complete:
                await _farewell(self._coordinator)
        coordinator_status = await end_of(self._coordinator, grace_seconds=_COORDINATOR_GRACE_SECONDS)
        if coordinator_status == LedgerError.exit_status:
            return coordinator_status
        if is_complete and min(status, coordinator_status) < 0:
            _log.warning("the run is complete, but one of its programs had to be killed")
            return 0
        return status or coordinator_status

    async def _is_complete(self, trainer: Child, coordinator: Child) -> bool:
        """Whether the run is: the trainer ended in order, or is on its way out after the coordinator."""
        if coordinator.status == 0:
            # It ends by itself only after the run.
            await trainer.wait_at_most(_TRAINER_GRACE_SECONDS)
            return True
        return trainer.status == 0 and not self._stop.is_set()

    async def _start_coordinator(self) -> bool:
        """Starts it on the port that it had, if it had one. False if it does not get ready."""
        path = str(self._settings.run_dir / "config.toml")
        command = [sys.executable, "-m", "learner.coordinator", path, "--bind", self._bind]
        self._coordinator = await Child.start("coordinator", command, capture=True)
        address = await unless_stopped(
            self._coordinator.ready_line("coordinator ready on", timeout_seconds=_COORDINATOR_START_SECONDS),
            self._stop,
            name="coordinator's start",
        )
        if address is None:
            await self._coordinator.wait_at_most(_COORDINATOR_GRACE_SECONDS)
            return False
        self._bind = address
        return True

    async def _start_trainer(self) -> None:
        arguments = [str(self._settings.run_dir), "--coordinator", self._bind]
        num_ranks = self._settings.training.num_ranks
        command = launch_command(module="learner.training", arguments=arguments, num_ranks=num_ranks)
        self._trainer = await Child.start("trainer", command)


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


async def end_of(child: Child, *, grace_seconds: float) -> int:
    """Stops a program and returns its exit status. Our SIGTERM may find one that does not listen yet, or no more:
    then it has ended in order too."""
    was_running = child.status is None
    status = await child.stop(grace_seconds=grace_seconds)
    return 0 if was_running and status == -signal.SIGTERM else status


async def _farewell(coordinator: Child) -> None:
    """The run is finished: the coordinator sends the actors home, and ends by itself."""
    if not await coordinator.wait_at_most(_FAREWELL_SECONDS):
        _log.warning("the coordinator still runs %.0f s after the run's end; stopping it", _FAREWELL_SECONDS)
