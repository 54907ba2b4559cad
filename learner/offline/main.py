"""`penstock train KIND RUN.toml`: reads the settings, starts the ranks, trains, and says what came of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from learner.offline.config import DpoConfig, OfflineConfig, RmConfig, SftConfig
from learner.offline.dpo import train_dpo
from learner.offline.rm import train_rm
from learner.offline.sft import train_sft
from learner.training.launch import launch_command
from learner.training.parallel import Ranks, open_ranks
from penstock import config as configuration
from penstock import log
from penstock.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Kind:
    config: type[OfflineConfig]
    train: Callable[[Any, Ranks], float]
    """Returns the mean loss of the last tenth of the steps."""
    description: str


_KINDS = {
    "sft": _Kind(SftConfig, train_sft, "Supervised fine-tuning on completions."),
    "dpo": _Kind(DpoConfig, train_dpo, "Direct preference optimisation on pairs of answers."),
    "rm": _Kind(RmConfig, train_rm, "A reward model from pairs of answers."),
}


def main(argv: Sequence[str]) -> int:
    """`penstock train KIND [RUN.toml] [--flag value ...]`. Several ranks replace this process by their agent."""
    kind = _KINDS.get(argv[0]) if argv else None
    if argv and argv[0] in ("-h", "--help"):
        for name, each in _KINDS.items():
            Console().print(f"penstock train {name} RUN.toml    {each.description}", highlight=False)
        return 0
    if kind is None:
        got = argv[0] if argv else "nothing"
        raise ConfigError(f"penstock train: got {got}; expected `penstock train {'|'.join(_KINDS)} RUN.toml`")
    prog = f"penstock train {argv[0]}"
    config = configuration.load(kind.config, argv[1:], prog=prog, description=kind.description)
    if config.num_ranks > 1 and "RANK" not in os.environ:
        command = launch_command(module="learner.offline", arguments=argv, num_ranks=config.num_ranks)
        os.execv(command[0], command)  # noqa: S606
    log.configure()
    with ExitStack() as stack:
        ranks = open_ranks(config.device, config.precision)
        stack.callback(ranks.close)
        final_loss = kind.train(config, ranks)
    if ranks.is_first:
        Console().print(f"final loss {final_loss:.4f}; policy written to {config.out}", highlight=False)
    return 0
