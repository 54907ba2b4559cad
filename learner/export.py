"""`penstock export RUN_DIR OUT`: a run's checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from learner.config import RunConfig
from learner.training.adapter_folder import check_adapter_folder, write_adapter_folder
from learner.training.adapters import Adapters, merged, parts_of
from learner.training.checkpoint import (
    POLICY,
    Checkpoint,
    CheckpointDamaged,
    checkpoint_folders,
    newest,
    verify,
)
from learner.training.checkpoint_reader import CheckpointReader
from learner.training.config import Precision
from learner.training.folder import check_output_folder, write_policy_folder
from learner.training.model import load_causal_lm, weights_digest
from learner.training.publish import named_tensors
from learner.training.retention import Retention
from penstock import config as configuration
from penstock.errors import ConfigError

_log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    step = export(
        arguments.run_dir,
        arguments.out,
        step=arguments.step,
        best=arguments.best,
        precision=Precision(arguments.dtype),
        adapter_only=arguments.adapter,
    )
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
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which checkpoint; the newest sound one if left out")
    which.add_argument(
        "--best", action="store_true", help="the best that is kept, by the run's training.checkpoint.metric"
    )
    parser.add_argument(
        "--dtype",
        choices=[str(p) for p in Precision],
        default="float32",
        help="of the weights that are written",
    )
    parser.add_argument(
        "--adapter", action="store_true", help="the adapters alone, as peft loads them; else they are merged"
    )
    return parser.parse_args(argv)


def export(
    run_dir: Path,
    out: Path,
    *,
    step: int | None = None,
    best: bool = False,
    precision: Precision = Precision.FLOAT32,
    adapter_only: bool = False,
) -> int:
    """Writes a sound checkpoint to `out`; returns its step. Safe while the run goes on. Raises ConfigError.

    best: the one that is best by the metric that the run's configuration names; else the newest, or that of `step`.
    adapter_only: of a run that trains adapters, those alone, as peft loads them; else they are merged.
    """
    if not (run_dir / "config.toml").is_file():
        raise ConfigError(f"{run_dir}: has no config.toml; expected the folder of a run")
    config = configuration.load(
        RunConfig, [str(run_dir / "config.toml")], prog="penstock export", description="A run."
    )
    (check_adapter_folder if adapter_only else check_output_folder)(out)
    folder = run_dir / "checkpoints"
    retention = Retention.of(config.training.checkpoint, run_dir)
    checkpoint = _find_best(folder, retention) if best else _find(folder, step)
    with CheckpointReader(checkpoint.path) as reader:
        names = [name for name in reader.tensors if name.startswith(POLICY)]
        tensors = {name.removeprefix(POLICY): reader.full(name) for name in names}
        adapters = reader.adapters
    if adapters is not None and weights_digest(config.policy) != adapters.base_digest:
        raise ConfigError(
            f"checkpoint {checkpoint.path} holds adapters of other weights than {config.policy} has now; "
            "put that folder back as it was when the run began"
        )
    if not adapter_only:
        whole = tensors if adapters is None else _merged(tensors, adapters, config.policy)
        write_policy_folder(out, whole, source=config.policy, precision=precision)
    elif adapters is None:
        raise ConfigError(f"{run_dir} trains all weights: it has no adapters; leave out --adapter")
    else:
        write_adapter_folder(out, tensors, adapters, source=config.policy, precision=precision)
    return checkpoint.step


def _merged(tensors: Mapping[str, torch.Tensor], adapters: Adapters, folder: Path) -> dict[str, torch.Tensor]:
    """The policy of a folder with adapters added to it."""
    base = dict(named_tensors(load_causal_lm(folder)))
    return merged(base, parts_of(tensors.items()), adapters.scale)


def _find_best(folder: Path, retention: Retention) -> Checkpoint:
    for path in retention.best_first(checkpoint_folders(folder)):
        try:
            return verify(path)
        except CheckpointDamaged as damage:
            _log.error("checkpoint %s is damaged, and the next best is taken: %s", path, damage)
    raise ConfigError(
        f"{folder}: has no sound checkpoint with the metric {retention.metric}; expected one that "
        "training.checkpoint.metric names: leave out --best, or mend the run's config.toml"
    )


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
