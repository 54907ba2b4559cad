"""`penstock replay RUN`: trains again on the batches that the ledger recorded, and compares every version.

No actor, no environment and no coordinator runs. The trainer is the run's own, with its
settings; what it asks of a coordinator is answered from the ledger.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from learner.config import RunConfig
from learner.coordinator.audit import Audit, audit
from learner.training.launch import launch_command
from penstock import config, log, parent
from penstock.errors import ConfigError

_CHECKPOINT = "step-"


def main(argv: Sequence[str]) -> int:
    """Exit status 0 if every version has the digest that it had. Raises ConfigError, LedgerError."""
    parser = argparse.ArgumentParser(prog="penstock replay", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's folder; no learner may be running in it")
    parser.add_argument(
        "--out", type=Path, help="folder of the replayed checkpoint and metrics; default RUN/replay"
    )
    arguments = parser.parse_args(argv)
    log.configure()
    run_dir: Path = arguments.run_dir.resolve()
    out: Path = (arguments.out or run_dir / "replay").resolve()
    settings = config.load(
        RunConfig, [str(run_dir / "config.toml")], prog="penstock replay", description=__doc__ or ""
    )
    start = _start(run_dir, audit(run_dir / "ledger.sqlite"))
    _prepare(out, start)
    command = launch_command(
        module="learner.training.replay",
        arguments=[str(run_dir), str(out)],
        num_ranks=settings.training.num_ranks,
    )
    status = subprocess.run(command, check=False, env=parent.marked()).returncode
    return status if status >= 0 else 128 - status


def _start(run_dir: Path, found: Audit) -> Path | None:
    """The checkpoint to start from; None for the initial policy. Raises ConfigError, naming what is missing."""
    if found.num_steps == 0:
        raise ConfigError(f"{run_dir}: no step was trained; there is nothing to replay")
    if found.payloads_from == 0:
        return None
    checkpoints = sorted((run_dir / "checkpoints").glob(f"{_CHECKPOINT}*"))
    steps = {int(path.name.removeprefix(_CHECKPOINT)): path for path in checkpoints}
    if found.payloads_from is not None:
        usable = [step for step in steps if found.payloads_from <= step < found.num_steps]
        if usable:
            return steps[min(usable)]
    gone = f"steps 0 to {(found.payloads_from or found.num_steps) - 1}"
    raise ConfigError(
        f"{run_dir}: the trajectories that {gone} trained on were deleted, and no checkpoint is kept from which "
        f"the rest could be trained (there are {sorted(steps) or 'none'}). Set `ledger.keep_payloads = true` "
        "before a run that is to be replayed"
    )


def _prepare(out: Path, start: Path | None) -> None:
    """An empty folder, but for the checkpoint to start from. Raises ConfigError."""
    marker = out / ".penstock-replay"
    try:
        if out.exists() and any(out.iterdir()) and not marker.exists():
            raise ConfigError(
                f"{out} is not empty and not an earlier replay; choose another folder with --out"
            )
        shutil.rmtree(out, ignore_errors=True)
        (out / "checkpoints").mkdir(parents=True)
        marker.touch()
        if start is not None:
            (out / "checkpoints" / start.name).symlink_to(start)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}; choose another folder with --out") from error
