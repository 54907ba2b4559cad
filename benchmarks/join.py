"""How soon an actor is of use, and how soon a learner that was killed is back at work.

    OMP_NUM_THREADS=1 python benchmarks/join.py [--repeats N] [--json FILE]

A run of a tiny policy: one environment server, one learner, one actor that stays.

    join       another actor is started; from the moment that it has loaded its libraries
               and joined to the commit of its first accepted trajectory
    recovery   the learner and all that it started are killed with SIGKILL, and the same
               command is given again; from there to the first version beyond the one that
               there was, less what loading takes: the time from a learner's start to its
               first version, measured when the run begins

Names: join_seconds, recovery_seconds (medians); restart_seconds and loading_seconds, whose
difference recovery_seconds is.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import apsw
from harness.report import add_arguments, write

from penstock.chaos.killer import end_tree
from penstock.quickstart import task
from penstock.quickstart.policy import make_policy
from penstock.quickstart.programs import Program, Programs

_PATIENCE_SECONDS = 120.0
FoundT = TypeVar("FoundT")

RUN = """
policy = "{policy}"
run_dir = "{run}"
environments = ["{environment}"]
bind = "127.0.0.1:{port}"
truncation_reward = 0.0
[schedule]
num_steps = 100000
groups_per_step = 4
group_size = 8
max_lag = 2
[sampling]
max_tokens = 8
[training]
device = "cpu"
[training.checkpoint]
every_steps = 5
"""


class Laboratory:
    """One run's programs, and its ledger."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        self.folder = folder
        self.address = ""
        self._programs = programs
        self._settings: dict[str, object] = {}
        self._num_started = 0

    async def prepare(self) -> None:
        policy = make_policy(self.folder / "policy", seed=0, characters=task.CHARACTERS, max_context=64)
        arguments = task.serve_arguments(seed=0, bind="127.0.0.1:0")
        server = await self._programs.start("environment", arguments)
        served = await self._programs.ready(server, "serving ", timeout_seconds=_PATIENCE_SECONDS)
        self._settings = {"policy": policy, "run": self.folder / "run"}
        self._settings["environment"] = served.rpartition(" on ")[2]

    async def start_learner(self) -> Program:
        """Starts it, or starts it again on the same port."""
        port = self.address.rpartition(":")[2] or "0"
        (self.folder / "run.toml").write_text(RUN.format(**self._settings, port=port))
        self._num_started += 1
        arguments = ["learner", str(self.folder / "run.toml")]
        learner = await self._programs.start(f"learner-{self._num_started}", arguments)
        self.address = await self._programs.ready(
            learner, "learner ready on ", timeout_seconds=_PATIENCE_SECONDS
        )
        return learner

    async def start_actor(self, name: str, *options: str) -> Program:
        arguments = ["actor", "--learner", self.address, "--name", name, "--device", "cpu", *options]
        return await self._programs.start(name, arguments, is_client=True)

    def first_accepted(self, actor: str) -> bool:
        sql = "SELECT 1 FROM trajectories JOIN sessions USING (session_id) WHERE actor_id = ? LIMIT 1"
        return bool(self._rows(sql, (actor,)))

    def newest(self) -> tuple[int, int]:
        """(epoch, step) of the newest version; (0, 0) before the first."""
        rows = self._rows("SELECT epoch, step FROM versions ORDER BY epoch DESC, step DESC LIMIT 1")
        return rows[0] if rows else (0, 0)

    def _rows(self, sql: str, parameters: tuple[str, ...] = ()) -> list[tuple[int, int]]:
        with apsw.Connection(
            str(self.folder / "run" / "ledger.sqlite"), flags=apsw.SQLITE_OPEN_READONLY
        ) as db:
            db.set_busy_timeout(5000)
            return db.execute(sql, parameters).fetchall()  # type: ignore[return-value]


async def until(found: Callable[[], FoundT], what: str) -> FoundT:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (result := found()):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {_PATIENCE_SECONDS:.0f} s for {what}")
        await asyncio.sleep(0.01)
    return result


async def measure_join(laboratory: Laboratory, number: int) -> float:
    name = f"joiner-{number}"
    actor = await laboratory.start_actor(name)
    await until(lambda: actor.line_after(f"actor {name} joined"), "the actor to join")
    began = time.monotonic()
    await until(lambda: laboratory.first_accepted(name), "its first trajectory")
    seconds = time.monotonic() - began
    # It drains: the leases of a killed one would hold up the next measurement.
    actor.dismiss()
    await actor.process.wait()
    return seconds


async def measure_recovery(laboratory: Laboratory, learner: Program) -> tuple[float, Program]:
    """Seconds from the new start to a version beyond the old one, and the new learner."""
    _, reached = laboratory.newest()
    await end_tree(learner.process.pid, learner.kill)
    began = time.monotonic()
    again = await laboratory.start_learner()
    await until(lambda: laboratory.newest()[1] > reached, f"a version beyond {reached}")
    return time.monotonic() - began, again


async def measure(folder: Path, repeats: int) -> dict[str, float]:
    async with Programs(folder / "logs") as programs:
        laboratory = Laboratory(folder, programs)
        await laboratory.prepare()
        began = time.monotonic()
        learner = await laboratory.start_learner()
        await until(lambda: laboratory.newest()[0] > 0, "the first version")
        loading = time.monotonic() - began
        # Few slots: where one actor keeps the learner busy, a second one rightly waits for room.
        await laboratory.start_actor("steady", "--num-slots", "8")
        await until(lambda: laboratory.newest()[1] > 2, "training to begin")
        joins = [await measure_join(laboratory, number) for number in range(repeats)]
        restarts = []
        for _ in range(repeats):
            seconds, learner = await measure_recovery(laboratory, learner)
            restarts.append(seconds)
            reached = laboratory.newest()[1] + 7
            await until(lambda reached=reached: laboratory.newest()[1] > reached, "a checkpoint")
    return {
        "join_seconds": statistics.median(joins),
        "recovery_seconds": max(statistics.median(restarts) - loading, 0.0),
        "restart_seconds": statistics.median(restarts),
        "loading_seconds": loading,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    add_arguments(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(measure(Path(folder), arguments.repeats))
    write(results, arguments)


if __name__ == "__main__":
    main()
