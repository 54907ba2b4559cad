"""`penstock chaos`: kills one program of a run every few seconds, and verifies what comes of it.

Starts the quickstart's run, then sends SIGKILL to its learner, coordinator, trainer, an
actor or the environment, in an order that the seed decides, and starts again what a
supervisor would. The run must end by itself. Then the ledger, every actor's history and
the trainer's metrics must tell one story: nothing that was acknowledged is lost, nothing
is trained twice. Exit status 1 if they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
import uvloop
from rich.console import Console

from penstock import log
from penstock.chaos.settings import ChaosConfig
from penstock.quickstart.display import Display
from penstock.quickstart.programs import Programs
from penstock.quickstart.settings import make_folder
from penstock.signals import Stop
from penstock.tasks import unless_stopped

if TYPE_CHECKING:
    from penstock.chaos.report import Report

_INTERRUPTED = 130
_CHECKPOINT_EVERY_STEPS = 5
"""Where a trainer dies every minute or two, what it made since the last one is what it costs."""


def main(argv: Sequence[str]) -> int:
    config = tyro.cli(ChaosConfig, args=list(argv), prog="penstock chaos", description=__doc__)
    log.configure("WARNING")
    folder = make_folder(config.run_dir or _next_free(Path("runs")))
    console = Console(highlight=False)
    display = Display(console, plain=True)
    display.say(f"chaos in {folder}, seed {config.seed}; logs in {folder / 'logs'}")
    report = uvloop.run(_run(config, folder, display))
    if report is None:
        display.say("stopped before the end")
        return _INTERRUPTED
    return _conclude(report, config, console)


def _next_free(parent: Path) -> Path:
    return next(path for number in count(1) if not (path := parent / f"chaos-{number}").exists())


async def _run(config: ChaosConfig, folder: Path, display: Display) -> Report | None:
    stop = Stop()
    stop.on_signals()
    histories = folder / "histories"
    histories.mkdir()
    async with Programs(folder / "logs") as programs:
        with display.working("importing torch"):
            from penstock.chaos.killer import Killer
            from penstock.chaos.report import verify
            from penstock.quickstart.stages import Quickstart

        quickstart = Quickstart(
            config.quickstart(),
            folder,
            display,
            programs,
            histories=histories,
            learner_options=("--training.checkpoint.every_steps", str(_CHECKPOINT_EVERY_STEPS)),
            steps_for=config.steps_for if config.steps is None else None,
        )
        killer = Killer(
            quickstart,
            minutes=config.minutes,
            every_seconds=config.every_seconds,
            seed=config.seed,
            may_begin=(folder / "accuracy-before.json").exists,
            say=display.say,
        )
        quickstart.disturbance = killer
        summary = await unless_stopped(quickstart.run(), stop, name="chaos")
    if summary is None:
        return None
    if killer.was_cut_short:
        display.say(
            f"the run ended before the {config.minutes:g} min of kills were over; --steps makes it longer"
        )
    return verify(folder, histories, summary, killer.kills)


def _conclude(report: Report, config: ChaosConfig, console: Console) -> int:
    from penstock.chaos.report import lines, table

    console.print()
    console.print(table(report))
    for line in lines(report):
        console.print(line, soft_wrap=True)
    if config.json is not None:
        report.write(config.json)
    return 0 if report.is_sound else 1
