"""A real coordinator process between scripted ends: actors here or in processes, a trainer process.

    async with Bench(tmp_path, num_steps=10) as bench:
        await bench.start()
        bench.actor("a1")
        await bench.trained()
        findings = bench.check()

Nothing here imports torch, so that a run of some dozen steps takes seconds. Waits have
generous deadlines: they bound a hang, and measure nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from environments.base import Description
from environments.wire import description_to_wire
from learner.config import (
    BreakerConfig,
    DiskConfig,
    FleetConfig,
    LedgerConfig,
    RunConfig,
    ScheduleConfig,
    WeightsConfig,
)
from learner.coordinator import segments, tables
from learner.coordinator.audit import audit
from learner.coordinator.core import NO_LIMITS
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.training.config import TrainingConfig
from penstock import config, parent, rpc
from penstock.chaos.checker import Findings, check
from penstock.chaos.evidence import gather
from penstock.cli.run_client import RunClient
from penstock.errors import PeerLost, PenstockError
from penstock.trajectory import Sampling
from penstock.v1 import environment_pb2_grpc, operator_pb2
from penstock.weights.media.collective import CollectiveReceiver

from .scripted_actor import Script, ScriptedActor

CHECKOUT = Path(__file__).parents[2]
PATIENCE_SECONDS = 90.0
ENVIRONMENT = "scripted"
VOCAB_SIZE = 16
QUICK_FLEET = FleetConfig(
    heartbeat_seconds=0.25, suspect_seconds=1.0, dead_seconds=2.0, progress_timeout_seconds=4.0
)
"""A tenth of the time that is usual, a fifth where more would make a busy machine look dead."""


RESTART_FLEET = FleetConfig(
    heartbeat_seconds=0.25, suspect_seconds=1.0, dead_seconds=5.0, progress_timeout_seconds=20.0
)
"""For learners that die: actors have time to join again, and what was granted to nobody is soon free."""
PATIENT_FLEET = FleetConfig(
    heartbeat_seconds=0.25, suspect_seconds=100.0, dead_seconds=200.0, progress_timeout_seconds=200.0
)
"""For faults that must not cost a lease, on however slow a machine."""


class FaultLength(StrEnum):
    """How much of a fault a test injects."""

    SHORT = "short"
    LONG = "long"

    def of(self, *, short: int, long: int) -> int:
        return long if self is FaultLength.LONG else short


class Describes(environment_pb2_grpc.EnvironmentServiceServicer):
    """All that a coordinator asks of an environment."""

    async def Describe(self, request: Any, context: Any) -> Any:
        description = Description(
            name=ENVIRONMENT, version="1", digest="ab", splits={"train": 1000, "eval": 100}
        )
        return description_to_wire(description)


class Process:
    """A program, its output in a file."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, **environ: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._from = self.log.stat().st_size if self.log.exists() else 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT), **environ}
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                arguments,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                env=parent.marked(environment),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def status(self) -> int | None:
        return self.popen.poll()

    def output(self) -> str:
        """Of this start, not of earlier ones of the same name."""
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to it and all that it started."""
        self.send(signal.SIGKILL)
        self.popen.wait()

    async def line(self, prefix: str) -> str:
        """The rest of the first line of output that begins with `prefix`."""

        def found() -> str | None:
            lines = self.output().splitlines()
            at = next((line for line in lines if line.startswith(prefix)), None)
            assert at is not None or self.status is None, f"{self.name} ended: {self.output()}"
            return None if at is None else at.removeprefix(prefix).strip()

        return await until(found, f"{self.name} to print {prefix!r}")

    async def end(self) -> int:
        """The exit status."""
        await until(lambda: self.status is not None, f"{self.name} to end")
        return self.popen.wait()


class Bench:
    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int = 10,
        groups_per_step: int = 2,
        group_size: int = 4,
        max_lag: int = 2,
        fleet: FleetConfig = QUICK_FLEET,
        breaker: BreakerConfig | None = None,
        environments: Sequence[str] = (),
        max_tokens: int = 100_000,
        keep_payloads: bool = False,
        disk: DiskConfig = NO_LIMITS,
        training: TrainingConfig = TrainingConfig(),  # noqa: B008
        weights: WeightsConfig = WeightsConfig(),  # noqa: B008
        evaluation: EvaluationConfig | None = None,
    ) -> None:
        """environments: addresses of real servers, for actors that ask them; by default one that is only described."""
        self.folder = folder
        self.run_dir = folder / "run"
        self.schedule = ScheduleConfig(
            num_steps=num_steps, groups_per_step=groups_per_step, group_size=group_size, max_lag=max_lag
        )
        self.fleet = fleet
        self.breaker = breaker or BreakerConfig()
        self.environments = tuple(environments)
        self.max_tokens = max_tokens
        self.keep_payloads = keep_payloads
        self.disk = disk
        self.training = training
        self.weights = weights
        self.evaluation = evaluation or EvaluationConfig()
        self.address = ""
        self.coordinator: Process | None = None
        self.trainer: Process | None = None
        self.actors: dict[str, ScriptedActor] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.processes: list[Process] = []
        self._environment = rpc.server()
        self._endpoint = ""

    async def __aenter__(self) -> Self:
        environment_pb2_grpc.add_EnvironmentServiceServicer_to_server(Describes(), self._environment)
        self._endpoint = f"127.0.0.1:{rpc.bind(self._environment, '127.0.0.1:0')}"
        await self._environment.start()
        _write_policy(self.folder / "policy")
        (self.folder / "histories").mkdir(exist_ok=True)
        self.run_dir.mkdir(exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.logs())
        await self.abandon(*self.tasks)
        for process in self.processes:
            process.kill()
        await self._environment.stop(0)

    # -- programs -----------------------------------------------------------------------

    async def start(self, *, step_seconds: float = 0.0) -> None:
        await self.start_coordinator()
        self.start_trainer(step_seconds=step_seconds)

    async def start_coordinator(self, *, within: Sequence[str] = (), **environ: str) -> Process:
        """Starts it, or starts it again on the same port. `within` is a command that runs the one after it."""
        port = self.address.rpartition(":")[2] or "0"
        settings = RunConfig(
            policy=self.folder / "policy",
            environments=self.environments or (self._endpoint,),
            run_dir=self.run_dir,
            bind=f"127.0.0.1:{port}",
            schedule=self.schedule,
            sampling=Sampling(max_tokens=self.max_tokens),
            fleet=self.fleet,
            breaker=self.breaker,
            ledger=LedgerConfig(keep_payloads=self.keep_payloads, disk=self.disk),
            training=self.training,
            weights=self.weights,
            evaluation=self.evaluation,
        )
        path = self.run_dir / "config.toml"
        path.write_text(config.to_toml(settings))
        command = [*within, sys.executable, "-m", "learner.coordinator", str(path)]
        self.coordinator = self.process("coordinator", command, **environ)
        self.address = await self.coordinator.line("coordinator ready on ")
        return self.coordinator

    def start_trainer(self, *, step_seconds: float = 0.0, ballast_bytes: int = 0) -> Process:
        module = [sys.executable, "-m", "tests.faults.scripted_trainer", self.address, str(self.folder)]
        options = ["--num-steps", str(self.schedule.num_steps), "--step-seconds", str(step_seconds)]
        options += ["--ballast-bytes", str(ballast_bytes)]
        self.trainer = self.process("trainer", [*module, *options])
        return self.trainer

    def actor(
        self,
        name: str,
        *,
        script: Script | None = None,
        num_slots: int = 8,
        address: str = "",
        asks: bool = False,
        groups: CollectiveReceiver | None = None,
    ) -> ScriptedActor:
        """An actor in this process."""
        made = ScriptedActor(
            address or self.address,
            name,
            self.history(name),
            script=script or Script(),
            num_slots=num_slots,
            asks=asks,
            groups=groups,
        )
        self.actors[name] = made
        self.tasks[name] = asyncio.create_task(made.run(), name=name)
        return made

    def actor_process(self, name: str, *options: str, within: Sequence[str] = (), **environ: str) -> Process:
        command = [*within, sys.executable, "-m", "tests.faults.scripted_actor", self.address]
        arguments = ["--name", name, "--history", str(self.history(name)), *options]
        return self.process(name, [*command, *arguments], **environ)

    def history(self, name: str) -> Path:
        return self.folder / "histories" / f"{name}.jsonl"

    async def abandon(self, *names: str) -> None:
        """Ends actors of this process without a word to the learner."""
        tasks = [self.tasks.pop(name) for name in names]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, PenstockError):
                await task

    def process(self, name: str, command: Sequence[str], **environ: str) -> Process:
        process = Process(name, command, self.folder, **environ)
        self.processes.append(process)
        return process

    # -- watching -----------------------------------------------------------------------

    async def status(self) -> operator_pb2.GetStatusResponse:
        async with RunClient(self.address, timeout_seconds=20.0) as run:
            return await run.status()

    async def reached(self, step: int) -> None:
        await self.when(lambda status: status.version.step >= step, f"version {step}")

    async def when(self, holds: Callable[[operator_pb2.GetStatusResponse], bool], what: str) -> None:
        """Waits until the run's status is as wanted."""
        async with RunClient(self.address, timeout_seconds=20.0) as run:
            deadline = time.monotonic() + PATIENCE_SECONDS
            status = None
            while status is None or not holds(status):
                assert time.monotonic() < deadline, f"waited for {what}; {status}"
                self._check_tasks()
                await asyncio.sleep(0.05)
                # Channels to one address share their backoff, and actors are waiting for the learner too.
                with contextlib.suppress(PeerLost):
                    status = await run.status()

    async def trained(self) -> None:
        """Waits for the end of the run: the trainer's, then that of actors and coordinator."""
        await self.trainer_ended()
        for name in list(self.tasks):
            await asyncio.wait_for(self.tasks.pop(name), PATIENCE_SECONDS)
        # It would wait some seconds for latecomers.
        await self.stop_coordinator()

    async def trainer_ended(self) -> None:
        assert self.trainer is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.trainer.status is None:
            assert time.monotonic() < deadline, "waited for the trainer to end"
            self._check_tasks()
            await asyncio.sleep(0.05)
        assert self.trainer.status == 0, self.trainer.output()

    async def stop_coordinator(self) -> None:
        """In order: what is on disk is then all there is."""
        assert self.coordinator is not None
        self.coordinator.send(signal.SIGTERM)
        assert await self.coordinator.end() == 0

    def check(self, *, complete: bool = True) -> Findings:
        """Verifies every invariant, and that something was trained. Nothing may be running.

        complete: the run came to its end, so that every step is there and nothing is pending.
        """
        histories = sorted((self.folder / "histories").glob("*.jsonl"))
        evidence = gather(self.run_dir, histories, self.folder / "journal.jsonl")
        audited = audit(self.run_dir / "ledger.sqlite")
        assert not audited.violations, "\n".join(map(str, audited.violations))
        assert audited.totals.max_lag_trained <= self.schedule.max_lag
        findings = check(evidence)
        assert not findings.violations, "\n".join(map(str, findings.violations))
        assert findings.trained > 0, "the throughput is zero"
        if complete:
            assert list(findings.steps) == list(range(self.schedule.num_steps))
            assert all(row.state != "pending" for row in evidence.ledger.rows.values())
        return findings

    def tally(self) -> dict[str, int]:
        """The ledger's counters, and how many trajectories are in which state."""
        ledger = gather(self.run_dir, ()).ledger
        states = [row.state for row in ledger.rows.values()]
        return {**ledger.tallies, **{state: states.count(state) for state in states}}

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        import apsw

        db = apsw.Connection(str(self.run_dir / "ledger.sqlite"), flags=apsw.SQLITE_OPEN_READONLY)
        return db.execute(sql).fetchall()

    def payloads(self) -> list[bytes]:
        """All that are kept."""
        places = self.rows(
            "SELECT segment, offset, num_bytes, checksum FROM trajectories WHERE segment NOT NULL"
        )
        found = segments.read(self.run_dir / segments.FOLDER, tables.places(places))
        return [payload for payload in found if payload is not None]

    def events(self, kind: str) -> list[str]:
        return [message for (message,) in self.rows(f"SELECT message FROM events WHERE kind = '{kind}'")]

    def logs(self) -> str:
        texts = [f"--- {process.name}\n{process.output()[-4000:]}" for process in self.processes]
        return "\n".join(texts)

    def _check_tasks(self) -> None:
        for name, task in self.tasks.items():
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise AssertionError(f"actor {name} ended") from task.exception()


async def until(
    condition: Callable[[], Any], what: str, *, seconds: float = PATIENCE_SECONDS, every: float = 0.05
) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        await asyncio.sleep(every)
    return result


async def refused_with(call: Any) -> grpc.StatusCode:
    """The status of a call that must fail."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    raise AssertionError("the call was answered")


def _write_policy(folder: Path) -> None:
    """What the coordinator looks at: it never loads the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config_json = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 1_000_000}
    (folder / "config.json").write_text(json.dumps(config_json))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
