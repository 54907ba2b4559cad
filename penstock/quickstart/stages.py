"""The quickstart's stages, from random weights to a picture.

    make a policy -> warm start -> train (environment server, learner, actors) -> export
                              \\-> accuracy before                                 \\-> accuracy after

Everything but the making of the first policy is done by the programs that a real run
uses, started on loopback.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from transformers.utils.logging import disable_progress_bar

from penstock.cli.run_client import RunClient
from penstock.errors import PeerLost, PenstockError
from penstock.quickstart import task
from penstock.quickstart.display import Display
from penstock.quickstart.policy import make_policy
from penstock.quickstart.programs import Program, Programs
from penstock.quickstart.settings import (
    MAX_TOKENS,
    WARM_START_SEQUENCES,
    QuickstartConfig,
    run_toml,
    warm_start_toml,
)
from penstock.quickstart.summary import Summary, draw, read_evaluations, read_points, trajectories_by_verdict
from penstock.tasks import task_group
from penstock.v1 import operator_pb2 as pb

_POLL_SECONDS = 0.5
_START_SECONDS = 120.0
_PROGRAM_SECONDS = 600.0
_STALLED_SECONDS = 180.0
_LEAVE_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What the training stage leaves for the summary."""

    status: pb.GetStatusResponse
    """The last one, of the finished run."""
    accuracy_before: float
    killed_at: float | None
    """Unix seconds."""
    engines: frozenset[str]
    """What the actors that joined generated with."""


class Disturbance(Protocol):
    """Does harm to a run. What it ends it must start again."""

    async def look(self, status: pb.GetStatusResponse | None) -> None:
        """Called every half second of training. None: the learner does not answer just now."""
        ...


class Quickstart:
    """Its programs may be killed and started again while they are watched: see `penstock.chaos`."""

    def __init__(
        self,
        config: QuickstartConfig,
        folder: Path,
        display: Display,
        programs: Programs,
        *,
        histories: Path | None = None,
        learner_options: Sequence[str] = (),
        steps_for: Callable[[float], int] | None = None,
    ) -> None:
        """
        histories: a folder in which each actor writes down what it sends and hears.
        steps_for: training steps of a machine whose warm start took so many seconds, instead of the configured ones.
        """
        self._config = config
        self._folder = folder
        self._display = display
        self._programs = programs
        self._environment = f"127.0.0.1:{_free_port()}"
        self._learner = f"127.0.0.1:{_free_port()}"
        self._histories = histories
        self._learner_options = learner_options
        self._steps_for = steps_for
        self.actors: list[Program] = []
        self.server: Program | None = None
        self.learner_program: Program | None = None
        self.disturbance: Disturbance | None = None

    @property
    def policy(self) -> Path:
        """The trained policy."""
        return self._folder / "policy"

    @property
    def serve_command(self) -> str:
        return shlex.join(["penstock", *self._serve_arguments()])

    @property
    def environment(self) -> str:
        return self._environment

    @property
    def learner(self) -> str:
        return self._learner

    async def run(self) -> Summary:
        """Raises PenstockError: a program died, or nothing moved for too long."""
        self.server = await self.start_environment()
        for _ in range(self._config.actors):
            await self.start_actor()
        warm_started = await self._warm_start()
        await self._programs.ready(self.server, "serving", timeout_seconds=_START_SECONDS)
        trained = await self._train(warm_started)
        with self._display.working("measuring the trained policy"):
            await self._programs.run(
                "export", ["export", str(self._folder), str(self.policy)], timeout_seconds=_PROGRAM_SECONDS
            )
            accuracy = await self._evaluate(self.policy, "after")
        return self._conclude(trained, accuracy)

    async def _warm_start(self) -> Path:
        config, folder = self._config, self._folder
        data, settings, out = (
            folder / "demonstrations.jsonl", folder / "warm-start.toml", folder / "warm-started",
        )  # fmt: skip
        with self._display.working("making a policy and demonstrations"):
            disable_progress_bar()
            initial = await asyncio.to_thread(
                make_policy, folder / "initial", seed=config.seed, characters=task.CHARACTERS, max_context=64
            )
            prompts = await asyncio.to_thread(task.training_prompts, seed=config.seed)
            count = config.warm_start_steps * WARM_START_SEQUENCES
            task.write_demonstrations(data, prompts, count=count, seed=config.seed)
            settings.write_text(warm_start_toml(config, policy=initial, data=data, out=out), encoding="utf-8")
        self._display.say(
            f"made a policy from random numbers, and {count:,} demonstrations, 4 in 10 of them right"
        )
        began = time.monotonic()
        with self._display.working("warm start: supervised learning from the demonstrations"):
            await self._programs.run(
                "warm-start", ["train", "sft", str(settings)], timeout_seconds=_PROGRAM_SECONDS
            )
        self._display.say("warm start done")
        if self._steps_for is not None:
            self._config = replace(config, steps=self._steps_for(time.monotonic() - began))
        return out

    async def _train(self, warm_started: Path) -> Trained:
        path = self._folder / "run.toml"
        path.write_text(
            run_toml(
                self._config,
                policy=warm_started,
                folder=self._folder,
                environment=self._environment,
                bind=self._learner,
                serve=self.serve_command,
            ),
            encoding="utf-8",
        )
        with self._display.working("starting the learner"):
            await self.start_learner()
        async with RunClient(self._learner) as run, task_group() as tasks:
            before = tasks.create_task(self._evaluate_before(warm_started), name="accuracy before")
            status, killed_at, engines = await self._watch(run)
        assert self.learner_program is not None
        await self._programs.finished(self.learner_program, timeout_seconds=_LEAVE_SECONDS)
        await self._see_actors_off()
        self._display.say(f"trained {status.ledger.trained:,} trajectories in {status.version.step} steps")
        return Trained(status=status, accuracy_before=before.result(), killed_at=killed_at, engines=engines)

    async def _watch(self, run: RunClient) -> tuple[pb.GetStatusResponse, float | None, frozenset[str]]:
        """Shows the run until it is finished.

        Returns its last state, when an actor was killed, and the engines of those that joined.
        """
        killed_at: float | None = None
        engines: set[str] = set()
        progress = _Progress()
        with self._display.watching() as show:
            while True:
                self._programs.check()
                status = await _status(run)
                if status is not None:
                    show(status)
                    engines.update(actor.engine for actor in status.actors)
                    if status.state == pb.RUN_STATE_FINISHED:
                        return status, killed_at, frozenset(engines)
                    if killed_at is None and self._kill_is_due(status):
                        killed_at = time.time()
                        await self._replace_an_actor()
                if self.disturbance is not None:
                    await self.disturbance.look(status)
                progress.check(status)
                await asyncio.sleep(_POLL_SECONDS)

    def _kill_is_due(self, status: pb.GetStatusResponse) -> bool:
        return self._config.kill_an_actor and status.version.step * 3 >= self._config.steps

    async def _replace_an_actor(self) -> None:
        victim = self.actors[0]
        victim.kill()
        successor = await self.start_actor()
        self._display.say(f"killed {victim.name} with SIGKILL, and started {successor.name}")

    async def start_environment(self, name: str = "environment") -> Program:
        self.server = await self._programs.start(name, self._serve_arguments())
        return self.server

    async def start_learner(self, name: str = "learner") -> Program:
        """Returns once actors may connect. The first start, or a later one of the same run."""
        arguments = ["learner", str(self._folder / "run.toml"), *self._learner_options]
        self.learner_program = await self._programs.start(name, arguments, may_finish=True)
        await self._programs.ready(self.learner_program, "learner ready on", timeout_seconds=_START_SECONDS)
        return self.learner_program

    async def start_actor(self) -> Program:
        name = f"actor-{len(self.actors) + 1}"
        arguments = [
            *("actor", "--learner", self._learner, "--name", name, "--num-slots", "64", "--device", "cpu"),
            *("--engine", self._config.engine),
            # It may wait for the learner through the whole warm start.
            *("--connect-seconds", str(_PROGRAM_SECONDS)),
        ]
        if self._histories is not None:
            arguments += ["--history", str(self._histories / f"{name}.jsonl")]
        actor = await self._programs.start(name, arguments, may_finish=True, is_client=True)
        self.actors.append(actor)
        return actor

    async def _see_actors_off(self) -> None:
        """Those that joined have been told to drain; one that was still starting will find nobody to join."""
        for actor in self.actors:
            if actor.line_after(f"actor {actor.name} joined") is None:
                actor.dismiss()
            await self._programs.finished(actor, timeout_seconds=_LEAVE_SECONDS)

    async def _evaluate_before(self, warm_started: Path) -> float:
        accuracy = await self._evaluate(warm_started, "before")
        self._display.say(f"held-out accuracy before training: {accuracy:.3f}")
        return accuracy

    async def _evaluate(self, policy: Path, when: str) -> float:
        result = self._folder / f"accuracy-{when}.json"
        arguments = [
            *("eval", "--policy", str(policy), "--environment", self._environment),
            *("--num-tasks", str(task.NUM_EVAL), "--max-tokens", str(MAX_TOKENS)),
            *("--seed", str(self._config.seed + 1), "--device", "cpu", "--json", str(result)),
        ]
        await self._programs.run(f"eval-{when}", arguments, timeout_seconds=_PROGRAM_SECONDS)
        (measured,) = json.loads(result.read_text(encoding="utf-8"))["policies"]
        return float(measured["scores"]["mean"]["pass_at"]["1"])

    def _conclude(self, trained: Trained, accuracy_after: float) -> Summary:
        """Writes the picture and summary.json."""
        config, ledger = self._config, trained.status.ledger
        metrics = self._folder / "metrics.jsonl"
        points = read_points(metrics)
        first = json.loads(metrics.read_text(encoding="utf-8").partition("\n")[0])["time"]
        killed_at = None if trained.killed_at is None else trained.killed_at - first
        evaluated = read_evaluations(self._folder / "evaluations.jsonl")
        picture = self._folder / "reward.png"
        draw(points, picture, max_lag=config.max_lag, killed_at=killed_at, evaluated=evaluated)
        training_seconds = points[-1].seconds - points[0].seconds
        summary = Summary(
            accuracy_before=trained.accuracy_before,
            accuracy_after=accuracy_after,
            versions=trained.status.version.step,
            max_lag=config.max_lag,
            max_lag_trained=ledger.max_lag_trained,
            ledger_imbalance=ledger.imbalance,
            trajectories=trajectories_by_verdict(ledger),
            mixed_version_trajectories=ledger.mixed_version_trained,
            seconds=round(self._display.seconds, 1),
            training_seconds=round(training_seconds, 1),
            tokens_per_second=round(ledger.tokens_trained / max(training_seconds, 1e-9), 1),
            seed=config.seed,
            engine="+".join(sorted(trained.engines)),
            num_actors=config.actors,
            killed_actor=killed_at is not None,
        )
        summary.write(self._folder / "summary.json")
        return summary

    def _serve_arguments(self) -> list[str]:
        return task.serve_arguments(seed=self._config.seed, bind=self._environment)


class _Progress:
    """Raises when a run makes no version, or does not answer, for three minutes."""

    def __init__(self) -> None:
        self._step = -1
        self._moved_at = time.monotonic()
        self._waiting_for = "the learner's first answer"

    def check(self, status: pb.GetStatusResponse | None) -> None:
        now = time.monotonic()
        if status is not None:
            self._waiting_for = status.waiting_for
            if status.version.step != self._step:
                self._step, self._moved_at = status.version.step, now
        if now - self._moved_at > _STALLED_SECONDS:
            raise PenstockError(
                f"no new version for {_STALLED_SECONDS:.0f} s; waiting for: {self._waiting_for}"
            )


async def _status(run: RunClient) -> pb.GetStatusResponse | None:
    """None if the learner does not answer just now."""
    try:
        return await run.status()
    except PeerLost:
        return None


def _free_port() -> int:
    """A port that is free now; the program that binds it says so if it no longer is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
