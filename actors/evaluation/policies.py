"""The policies that are evaluated, one after the other, on one engine where that is possible."""

from __future__ import annotations

import contextlib
import importlib
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Generator
from pathlib import Path

from actors.engines.base import Engine
from actors.engines.choose import choose_device, choose_engine, make_engine
from actors.evaluation.config import EvalConfig
from actors.policy_weights import stage_policy
from penstock.errors import ConfigError
from penstock.policy_files import read_policy_folder
from penstock.trajectory import PolicyVersion

_log = logging.getLogger(__name__)


def named_policies(settings: EvalConfig) -> Generator[tuple[str, Path]]:
    """Name and folder of each: those given, or a run's checkpoints, exported in turn. Raises ConfigError."""
    if settings.run is None:
        yield from ((str(folder), folder) for folder in settings.policy)
        return
    steps = checkpoint_steps(settings.run)
    # Actors import nothing of the learner's; this command alone, and only here.
    export = importlib.import_module("learner.export").export
    with tempfile.TemporaryDirectory(prefix="penstock-eval-") as folder:
        for step in steps:
            out = Path(folder) / f"step-{step}"
            try:
                export(settings.run, out, step=step)
            except ConfigError as error:
                if step in checkpoint_steps(settings.run):
                    raise
                _log.warning("step %d is left out, the run has deleted it meanwhile: %s", step, error)
                continue
            yield f"step {step}", out
            shutil.rmtree(out)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Oldest first. Raises ConfigError."""
    names = [path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*")]
    steps = sorted(int(name) for name in names if name.isdigit())
    if not steps:
        raise ConfigError(
            f"{run_dir}: keeps no checkpoint; expected the folder of a run that has written one"
        )
    return steps


class Engines:
    """An engine that goes from one policy to the next by an install, as long as their architecture is the same."""

    def __init__(self, settings: EvalConfig) -> None:
        self._settings = settings
        self._engine: Engine | None = None
        self._architecture = b""
        self._num_installs = 0

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Engines]:
        try:
            yield self
        finally:
            await self._stop()

    async def with_policy(self, folder: Path) -> Engine:
        """Raises ConfigError, EngineFault."""
        read_policy_folder(folder)
        architecture = (folder / "config.json").read_bytes()
        if self._engine is None or architecture != self._architecture:
            await self._stop()
            settings = self._settings
            device = choose_device(settings.device)
            name = choose_engine(settings.engine, device)
            self._engine = make_engine(name, folder, num_slots=settings.num_slots, device=device)
            self._architecture = architecture
            await self._engine.start()
        await self._engine.install(stage_policy(folder, PolicyVersion(0, self._num_installs)))
        self._num_installs += 1
        return self._engine

    async def _stop(self) -> None:
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.stop()
