"""`penstock quickstart`: a tiny policy learns on this machine, through every part of penstock.

Makes a policy, warm-starts it, then trains it with one environment server, one learner
and two actors as separate processes on loopback. Takes a few minutes on two cores.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
import uvloop
from rich.console import Console

from penstock import log
from penstock.quickstart.display import Display
from penstock.quickstart.programs import Programs
from penstock.quickstart.settings import QuickstartConfig, make_folder
from penstock.signals import Stop
from penstock.tasks import unless_stopped

if TYPE_CHECKING:
    from penstock.quickstart.stages import Quickstart
    from penstock.quickstart.summary import Summary

_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    config = tyro.cli(
        QuickstartConfig,
        args=list(argv),
        prog="penstock quickstart",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    log.configure("WARNING")
    folder = make_folder(config.run_dir)
    console = Console(highlight=False)
    display = Display(console, plain=config.plain or not console.is_terminal)
    display.say(f"quickstart in {_shown(folder)}, seed {config.seed}; logs in {_shown(folder / 'logs')}")
    return uvloop.run(_run(config, folder, display))


async def _run(config: QuickstartConfig, folder: Path, display: Display) -> int:
    stop = Stop()
    stop.on_signals()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, stop.set, "SIGHUP")
    async with Programs(folder / "logs") as programs:
        with display.working("importing torch"):
            from penstock.quickstart.stages import Quickstart

        quickstart = Quickstart(config, folder, display, programs)
        summary = await unless_stopped(quickstart.run(), stop, name="quickstart")
        if summary is None:
            display.say("stopping every program")
    if summary is None:
        display.say(f"stopped before the end; {_shown(folder)} holds what there is")
        return _INTERRUPTED
    for line in closing_lines(quickstart, folder, summary):
        display.add(line)
    return 0


def closing_lines(quickstart: Quickstart, folder: Path, summary: Summary) -> list[str]:
    """What came of it, and where to look further."""
    penstock = _command()
    run = _shown(folder)
    trajectories = summary.trajectories
    return [
        "",
        f"held-out accuracy   {summary.accuracy_before:.3f} before, {summary.accuracy_after:.3f} after training "
        f"({summary.seconds:.0f} s in all)",
        f"lag                 {summary.max_lag_trained} at most, bound {summary.max_lag}; "
        f"{summary.mixed_version_trajectories:,} trajectories hold tokens of several versions",
        f"ledger              {trajectories['accepted']:,} accepted, {trajectories['trained']:,} trained, "
        f"{trajectories['pending']:,} pending; imbalance {summary.ledger_imbalance}",
        f"picture             {run / 'reward.png'}",
        f"folder              {run}  (summary.json, run.toml, policy/, logs/)",
        "",
        "To look further, serve the environment again:",
        f"  {quickstart.serve_command.replace('penstock', penstock, 1)}",
        "and in other terminals measure the policy, export it, or train on with as many actors as you like:",
        f"  {penstock} eval --policy {_shown(quickstart.policy)} --environment {quickstart.environment}",
        f"  {penstock} export {run} my-policy --dtype bfloat16",
        f"  {penstock} learner {run / 'run.toml'} --schedule.num-steps {2 * summary.versions}",
        f"  {penstock} actor --learner {quickstart.learner} --engine {summary.engine}",
    ]


def _shown(path: Path) -> Path:
    """Relative to the current folder, if it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _command() -> str:
    """How this installation's `penstock` is called from here."""
    script = Path(sys.executable).parent / "penstock"
    found = shutil.which("penstock")
    if found is not None and Path(found).samefile(script):
        return "penstock"
    return str(_shown(script))
