"""Real processes on loopback: environment servers, a learner, actors.

Each is started by its command line, as a user would, and logs into the run's folder.
Waits have generous deadlines: they bound a hang, and measure nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import grpc

from learner.coordinator.ledger import Ledger, Totals
from penstock.quickstart.policy import make_policy
from penstock.v1 import operator_pb2, operator_pb2_grpc

HERE = Path(__file__).parent
PATIENCE_SECONDS = 120.0


class Program:
    """A running command, its output in a file."""

    def __init__(self, name: str, arguments: list[str], folder: Path, *, within: Sequence[str] = ()) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        environ = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path, HF_HUB_OFFLINE="1")
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*within, sys.executable, "-m", "penstock.cli", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                env=environ,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_line(self, prefix: str) -> str:
        """The rest of the first line of output that begins with `prefix`."""

        def found() -> str | None:
            for line in self.output().splitlines():
                if line.startswith(prefix):
                    return line.removeprefix(prefix).strip()
            assert self.process.poll() is None, f"{self.name} ended: {self.output()}"
            return None

        return wait_until(found, f"{self.name} to print {prefix!r}")

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end: {self.output()}") from None

    def interrupt(self) -> int:
        """Ctrl-C, and the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL to the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Cluster:
    """The processes of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = make_policy(
            folder / "policy",
            seed=0,
            characters="abcdefgh=",
            hidden_size=32,
            num_layers=1,
            intermediate_size=64,
            head_dim=16,
        )
        self.run_dir = folder / "run"
        self.address = ""
        self.programs: list[Program] = []
        self.environments: list[str] = []

    def start(self, name: str, *arguments: str, within: Sequence[str] = ()) -> Program:
        """Runs `penstock ARGUMENTS`; `within` is a command that runs the command after it."""
        program = Program(name, list(arguments), self.folder, within=within)
        self.programs.append(program)
        return program

    def environment(self, target: str, *options: str) -> Program:
        name = f"env-{len(self.environments)}"
        program = self.start(
            name, "env", "serve", target, "--bind", "127.0.0.1:0", "--workers", "1", *options
        )
        self.environments.append(program.wait_for_line("serving ").rpartition(" on ")[2])
        return program

    def learner(self, *options: str, num_steps: int = 6, name: str = "learner") -> Program:
        """Starts a learner, or starts it again with the same command."""
        self.write_config(num_steps=num_steps)
        program = self.start(name, "learner", "run.toml", *options)
        self.address = program.wait_for_line("learner ready on ")
        return program

    def actor(self, name: str, *options: str, within: Sequence[str] = ()) -> Program:
        flags = ("--learner", self.address, "--name", name, "--num_slots", "8")
        return self.start(name, "actor", *flags, *options, within=within)

    def write_config(self, *, num_steps: int) -> None:
        environments = ", ".join(f'"{address}"' for address in self.environments)
        port = self.address.rpartition(":")[2] or "0"
        (self.folder / "run.toml").write_text(
            f"""
            policy = "policy"
            environments = [{environments}]
            run_dir = "run"
            bind = "127.0.0.1:{port}"
            [schedule]
            num_steps = {num_steps}
            groups_per_step = 2
            group_size = 4
            max_lag = 2
            [sampling]
            max_tokens = 6
            [training.optimizer]
            learning_rate = 1e-3
            [training.checkpoint]
            every_steps = 2
            [ledger.disk]
            ballast_bytes = 1_048_576
            """
        )

    def status(self) -> operator_pb2.GetStatusResponse:
        with grpc.insecure_channel(self.address) as channel:
            stub = operator_pb2_grpc.OperatorServiceStub(channel)
            return stub.GetStatus(operator_pb2.GetStatusRequest(), timeout=20.0)

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.status().version.step >= step, f"version {step}")

    def totals(self) -> Totals:
        """What the ledger holds, read while no learner runs."""
        ledger = Ledger(self.run_dir / "ledger.sqlite")
        try:
            return ledger.totals()
        finally:
            ledger.close()

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        db = apsw.Connection(str(self.run_dir / "ledger.sqlite"), flags=apsw.SQLITE_OPEN_READONLY)
        return db.execute(sql).fetchall()

    def logs(self) -> str:
        return "\n".join(f"--- {program.name}\n{program.output()}" for program in self.programs)

    def close(self) -> None:
        for program in self.programs:
            program.kill()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    made = Cluster(folder)
    try:
        yield made
    except BaseException:
        print(made.logs())
        raise
    finally:
        made.close()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
