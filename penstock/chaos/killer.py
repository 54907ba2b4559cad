"""Kills one program after another of a run, and starts again what a supervisor would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from penstock.errors import PenstockError
from penstock.quickstart.stages import Quickstart
from penstock.v1 import operator_pb2 as pb

_GONE_SECONDS = 10.0
_LAST_STEPS = 2
"""Nobody is killed when the run has no more steps than this to go."""


class Victim(StrEnum):
    LEARNER = "learner"
    """The supervisor, and both programs that it keeps."""
    COORDINATOR = "coordinator"
    TRAINER = "trainer"
    ACTOR = "actor"
    ENVIRONMENT = "environment"


@dataclass(slots=True, kw_only=True)
class Kill:
    victim: Victim
    seconds: float
    """Since the first look at the run."""
    step: int
    """The newest version's, when it was last heard of."""
    at: float
    recovery_seconds: float | None = None
    """Until the run published a version beyond `step`; None: it ended before."""


class Killer:
    """A Disturbance. Kills the first once the policy's accuracy before training is measured: a run may be short."""

    def __init__(
        self,
        quickstart: Quickstart,
        *,
        minutes: float,
        every_seconds: float,
        seed: int,
        may_begin: Callable[[], bool],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kills: list[Kill] = []
        self._quickstart = quickstart
        self._seconds = 60.0 * minutes
        self._every_seconds = every_seconds
        self._random = random.Random(seed)
        self._may_begin = may_begin
        self._say = say
        self._clock = clock
        self._began: float | None = None
        self._looked = self._due = 0.0
        self._step = 0

    @property
    def was_cut_short(self) -> bool:
        """Whether the run ended before the time was up."""
        return self._began is None or self._looked - self._began < self._seconds

    async def look(self, status: pb.GetStatusResponse | None) -> None:
        self._looked = now = self._clock()
        if status is not None:
            self._note(status.version.step, now)
        if self._began is None:
            if not self._may_begin():
                return
            self._began = self._due = now
        is_over = now - self._began > self._seconds
        if is_over or now < self._due or status is None:
            return
        if status.version.step + _LAST_STEPS < status.num_steps:
            self._due += self._every_seconds
            await self._kill(self._random.choice(list(Victim)), now)

    def _note(self, step: int, now: float) -> None:
        self._step = step
        for kill in self.kills:
            if kill.recovery_seconds is None and step > kill.step:
                kill.recovery_seconds = now - kill.at

    async def _kill(self, victim: Victim, now: float) -> None:
        assert self._began is not None
        self.kills.append(Kill(victim=victim, seconds=now - self._began, step=self._step, at=now))
        self._say(f"kill {len(self.kills)}: {victim}, at version {self._step}")
        number = len(self.kills) + 1
        quickstart = self._quickstart
        match victim:
            case Victim.ACTOR:
                living = [actor for actor in quickstart.actors if not actor.killed]
                self._random.choice(living).kill()
                await quickstart.start_actor()
            case Victim.ENVIRONMENT:
                assert quickstart.server is not None
                await end_tree(quickstart.server.process.pid, quickstart.server.kill)
                await quickstart.start_environment(f"environment-{number}")
            case Victim.LEARNER:
                assert quickstart.learner_program is not None
                program = quickstart.learner_program
                await end_tree(program.process.pid, program.kill)
                await quickstart.start_learner(f"learner-{number}")
            case Victim.COORDINATOR | Victim.TRAINER:
                assert quickstart.learner_program is not None
                self._kill_child(quickstart.learner_program.process.pid, victim)

    def _kill_child(self, pid: int, victim: Victim) -> None:
        module = "learner.coordinator" if victim is Victim.COORDINATOR else "learner.training"
        for child in descendants(pid):
            with contextlib.suppress(OSError):
                if module in (Path("/proc") / str(child) / "cmdline").read_text().split("\0"):
                    os.kill(child, signal.SIGKILL)
                    return
        # It is being started again just now: that is its end too.
        self._say(f"no {victim} runs at this moment")


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs."""
    parents = dict(_parents())
    found, known = [], {pid}
    while new := [child for child, parent in parents.items() if parent in known and child not in known]:
        found += new
        known.update(new)
    return found


async def end_tree(pid: int, kill: Callable[[], None]) -> None:
    """Kills a program and all that it started. Raises PenstockError if one of them outlives that."""
    tree = descendants(pid)
    kill()
    for child in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + _GONE_SECONDS
    while alive := [child for child in (pid, *tree) if _is_alive(child)]:
        if time.monotonic() > deadline:
            raise PenstockError(f"processes {alive} outlive SIGKILL by {_GONE_SECONDS:.0f} s")
        await asyncio.sleep(0.05)


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                yield int(path.name), int(_status(path).split()[1])


def _is_alive(pid: int) -> bool:
    try:
        return _status(Path("/proc") / str(pid)).split()[0] != "Z"
    except OSError:
        return False


def _status(path: Path) -> str:
    """State, parent and so on: what follows the name, which may hold anything."""
    return (path / "stat").read_text().rpartition(")")[2]
