"""Whole runs for benchmarks: real processes on loopback, on the quickstart's task.

async with Laboratory(folder, seed=0) as laboratory:
    run = await laboratory.train("async", max_lag=4, num_steps=60)
    print(run.seconds_to(0.8))
"""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from penstock.cli.run_client import RunClient
from penstock.errors import PeerLost
from penstock.quickstart import task
from penstock.quickstart.policy import make_policy
from penstock.quickstart.programs import Program, Programs
from penstock.quickstart.settings import (
    ALGORITHM,
    WARM_START_SEQUENCES,
    QuickstartConfig,
    run_toml,
    warm_start_toml,
)
from penstock.v1 import operator_pb2 as pb

_START_SECONDS = 180.0
_RUN_SECONDS = 1800.0
_SMOOTHED_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One training step, as the trainer recorded it."""

    time: float
    """Unix seconds at which the version was published."""
    reward: float
    wait_seconds: float
    step_seconds: float
    lag_mean: float
    lag_max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run came to."""

    steps: Sequence[Step]
    began: float
    """Unix seconds at which the first version was there and actors could begin."""
    status: pb.GetStatusResponse
    """The last one."""
    actor_idle_share: float
    """Of the observations of actors, those in which the engine had nothing to decode."""

    def seconds_to(self, reward: float) -> float | None:
        """From the beginning to the first step at which the mean of five steps' rewards is there."""
        times = [step.time - self.began for step in self.steps]
        return seconds_to(reward, times, [step.reward for step in self.steps])

    @property
    def seconds(self) -> float:
        return self.steps[-1].time - self.began

    @property
    def learner_wait_share(self) -> float:
        return sum(step.wait_seconds for step in self.steps) / self.seconds

    @property
    def wasted_share(self) -> float:
        """Of the accepted trajectories, those that will not be trained: stale, surplus or dropped.

        What is under way when the run ends is not counted: it is the end's, not the schedule's.
        """
        ledger = self.status.ledger
        wasted = ledger.stale + ledger.surplus + ledger.group_dropped + ledger.quarantined
        return wasted / max(ledger.trained + wasted, 1)

    @property
    def lag_mean(self) -> float:
        return sum(step.lag_mean for step in self.steps) / len(self.steps)


def seconds_to(reward: float, times: Sequence[float], rewards: Sequence[float]) -> float | None:
    """The time of the first step at which the mean of the last five rewards is at least `reward`."""
    for last in range(_SMOOTHED_STEPS - 1, len(times)):
        if sum(rewards[last + 1 - _SMOOTHED_STEPS : last + 1]) / _SMOOTHED_STEPS >= reward:
            return times[last]
    return None


class Laboratory:
    """One warm-started policy and one environment server, for any number of runs."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self.policy = folder / "warm-started"
        self.environment = f"127.0.0.1:{_free_port()}"
        self._programs = Programs(folder / "logs")
        slow = str(Path(__file__).with_name("slow_environment.py"))
        self._slow = Programs(folder / "logs", command=(sys.executable, slow))

    async def __aenter__(self) -> Self:
        await self._programs.__aenter__()
        await self._slow.__aenter__()
        server = await self._programs.start(
            "environment", task.serve_arguments(seed=self.seed, bind=self.environment)
        )
        await self._warm_start()
        await self._programs.ready(server, "serving", timeout_seconds=_START_SECONDS)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._slow.stop()
        await self._programs.stop()

    async def slow_environment(self) -> str:
        """Serves the same task with slow steps; returns the address."""
        arguments = [self.environment, "--seed", str(self.seed)]
        server = await self._slow.start("slow-environment", arguments)
        return await self._slow.ready(server, "serving on", timeout_seconds=_START_SECONDS)

    async def train(
        self,
        name: str,
        *,
        max_lag: int,
        num_steps: int,
        environment: str = "",
        num_actors: int = 2,
        num_slots: int = 64,
        pipeline_depth: int | None = None,
        algorithm: str = ALGORITHM,
    ) -> Run:
        """Trains from the warm-started policy; everything of the run ends with it.

        num_slots: of each actor.
        pipeline_depth and algorithm (the lines of [algorithm]): the quickstart's, unless given.
        """
        folder = self.folder / name
        folder.mkdir()
        address = f"127.0.0.1:{_free_port()}"
        config = QuickstartConfig(seed=self.seed, max_lag=max_lag, steps=num_steps)
        served = environment or self.environment
        text = run_toml(
            config, policy=self.policy, folder=folder, environment=served, bind=address,
            serve=shlex.join(["penstock", *task.serve_arguments(seed=self.seed, bind=served)]),
            pipeline_depth=pipeline_depth, algorithm=algorithm,
        )  # fmt: skip
        (folder / "run.toml").write_text(text, encoding="utf-8")
        async with Programs(folder / "logs") as programs:
            # Peers do not evaluate meanwhile either.
            arguments = ["learner", str(folder / "run.toml"), "--evaluation.every-steps", "0"]
            learner = await programs.start("learner", arguments, may_finish=True)
            actors = [
                await _start_actor(programs, address, number, num_slots)
                for number in range(1, num_actors + 1)
            ]
            await programs.ready(learner, "learner ready on", timeout_seconds=_START_SECONDS)
            status, began, idle = await _watch(programs, address, num_actors)
            for program in (learner, *actors):
                await programs.finished(program, timeout_seconds=_START_SECONDS)
        return Run(
            steps=_read_steps(folder / "metrics.jsonl"), began=began, status=status, actor_idle_share=idle
        )

    async def _warm_start(self) -> None:
        config = QuickstartConfig(seed=self.seed)
        initial = make_policy(
            self.folder / "initial", seed=self.seed, characters=task.CHARACTERS, max_context=64
        )
        data, settings = self.folder / "demonstrations.jsonl", self.folder / "warm-start.toml"
        task.write_demonstrations(
            data,
            task.training_prompts(seed=self.seed),
            count=config.warm_start_steps * WARM_START_SEQUENCES,
            seed=self.seed,
        )
        settings.write_text(
            warm_start_toml(config, policy=initial, data=data, out=self.policy), encoding="utf-8"
        )
        await self._programs.run("warm-start", ["train", "sft", str(settings)], timeout_seconds=_RUN_SECONDS)


async def _start_actor(programs: Programs, address: str, number: int, num_slots: int) -> Program:
    arguments = ("actor", "--learner", address, "--name", f"actor-{number}", "--num-slots", str(num_slots))
    return await programs.start(
        f"actor-{number}", [*arguments, "--device", "cpu"], may_finish=True, is_client=True
    )


async def _watch(
    programs: Programs, address: str, num_actors: int
) -> tuple[pb.GetStatusResponse, float, float]:
    """The last status, when the actors had joined, and the share of observations that saw an idle engine."""
    began, num_seen, num_idle = 0.0, 0, 0
    async with asyncio.timeout(_RUN_SECONDS), RunClient(address) as run:
        while True:
            programs.check()
            await asyncio.sleep(0.25)
            try:
                status = await run.status()
            except PeerLost:
                continue
            if not began and status.version.epoch and len(status.actors) == num_actors:
                began = time.time()
            if status.state == pb.RUN_STATE_FINISHED:
                return status, began, num_idle / max(num_seen, 1)
            for actor in status.actors if status.version.step else ():
                num_seen += 1
                num_idle += actor.stats.num_running == 0


def _read_steps(path: Path) -> list[Step]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Step(
            time=row["time"],
            reward=row["reward_mean"],
            wait_seconds=row["wait_seconds"],
            step_seconds=row["step_seconds"],
            lag_mean=row["lag_mean"],
            lag_max=row["lag_max"],
        )
        for row in rows
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
