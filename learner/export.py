"""`penstock export RUN_DIR OUT`: a run's checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from learner.config import RunConfig
from learner.training.checkpoint import (
    POLICY,
    Checkpoint,
    CheckpointDamaged,
    CheckpointReader,
    newest,
    verify,
)
from learner.training.config import Precision
from learner.training.folder import check_output_folder, write_policy_folder
from penstock import config as configuration
from penstock.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    step = export(arguments.run_dir, arguments.out, step=arguments.step, precision=Precision(arguments.dtype))
    Console().print(f"step {step} written to {arguments.out}", highlight=False)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="penstock export", description="Writes a checkpoint as a Hugging Face folder."
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run's folder")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the folder to write; a policy there is replaced"
    )
    parser.add_argument("--step", type=int, help="which checkpoint; the newest sound one if left out")
    parser.add_argument(
        "--dtype",
        choices=[str(p) for p in Precision],
        default="float32",
        help="of the weights that are written",
    )
    return parser.parse_args(argv)


def export(
    run_dir: Path, out: Path, *, step: int | None = None, precision: Precision = Precision.FLOAT32
) -> int:
    """Writes a sound checkpoint to `out`; returns its step. Safe while the run goes on. Raises ConfigError."""
    if not (run_dir / "config.toml").is_file():
        raise ConfigError(f"{run_dir}: has no config.toml; expected the folder of a run")
    config = configuration.load(
        RunConfig, [str(run_dir / "config.toml")], prog="penstock export", description="A run."
    )
    check_output_folder(out)
    checkpoint = _find(run_dir / "checkpoints", step)
    with CheckpointReader(checkpoint.path) as reader:
        names = [name for name in reader.tensors if name.startswith(POLICY)]
        tensors = {name.removeprefix(POLICY): reader.full(name) for name in names}
    write_policy_folder(out, tensors, source=config.policy, precision=precision)
    return checkpoint.step


def _find(folder: Path, step: int | None) -> Checkpoint:
    if step is None:
        found = newest(folder)
        if found is None:
            raise ConfigError(f"{folder}: has no sound checkpoint; the run has written none yet")
        return found
    path = folder / f"step-{step:08d}"
    if not path.is_dir():
        steps = sorted(int(other.name.removeprefix("step-")) for other in folder.glob("step-*"))
        raise ConfigError(f"{folder}: has no checkpoint of step {step}; it has {steps or 'none'}")
    try:
        return verify(path)
    except CheckpointDamaged as damage:
        raise ConfigError(f"checkpoint {path} is damaged: {damage}; choose another step") from damage
