"""`penstock COMMAND ...`: finds the program and hands it the rest of the command line.

Programs are imported when asked for, so that `penstock why` does not wait for torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from penstock import parent
from penstock.errors import PenstockError
from penstock.memory import loading


@dataclass(frozen=True, slots=True)
class _Command:
    target: str
    """module:function, taking the arguments after the command and returning the exit status."""
    summary: str


# gRPC's own log tells users nothing: our errors carry what it knows.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

_COMMANDS = {
    "quickstart": _Command("penstock.quickstart.main:main", "train a tiny policy on this machine, and watch"),
    "learner": _Command("learner.main:main", "start a run: coordinator and trainer"),
    "actor": _Command("actors.main:main", "generate for a learner"),
    "env": _Command("environments.main:main", "serve or check an environment"),
    "train": _Command("learner.offline.main:main", "train from files: sft, dpo, rm"),
    "eval": _Command("actors.evaluation.main:main", "measure policies on environments"),
    "export": _Command("learner.export:main", "write a checkpoint as a Hugging Face folder"),
    "ledger": _Command("penstock.cli.ledger:main", "inspect and verify a run's ledger"),
    "replay": _Command("learner.replay:main", "train again from a run's ledger, and compare every version"),
    "chaos": _Command(
        "penstock.chaos.main:main", "kill a run's programs one by one, and verify what comes of it"
    ),
    "top": _Command("penstock.cli.operations:top", "watch a run"),
    "status": _Command("penstock.cli.operations:status", "print a run's state"),
    "why": _Command("penstock.cli.operations:why", "say what a run is waiting for"),
    "events": _Command("penstock.cli.operations:events", "print what happened in a run"),
    "pause": _Command("penstock.cli.operations:pause", "grant no more leases"),
    "resume": _Command("penstock.cli.operations:resume", "grant leases again"),
    "checkpoint": _Command("penstock.cli.operations:checkpoint", "write a checkpoint now"),
    "drain": _Command("penstock.cli.operations:drain", "let one actor finish and leave"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit status: 2 for bad input, 1 for other failures."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    command = _COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f"; did you mean `penstock {near[0]}`?" if near else "; `penstock --help` lists them"
        print(f"penstock: no command {name!r}{hint}", file=sys.stderr)
        return 2
    parent.follow(signal.SIGTERM)
    return run(command.target, rest)


def run(target: str, argv: Sequence[str]) -> int:
    """Calls module:function(argv); turns penstock's own errors into a line and a status."""
    module, _, function = target.partition(":")
    try:
        with loading():
            program = getattr(importlib.import_module(module), function)
        status: int = program(list(argv))
    except PenstockError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return status


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in _COMMANDS.items()]
    return "usage: penstock COMMAND [--help] ...\n\n" + "\n".join(lines)
