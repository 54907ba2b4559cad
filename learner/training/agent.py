"""Starts the ranks of a trainer on this host, and ends them together.

One rank is a plain process. Several run under torch's elastic agent, which ends all
when one fails. The agent and its ranks meet through files and talk over the loopback
interface: nothing listens beyond 127.0.0.1. The agent never starts ranks again by
itself: that is for whoever started the agent, and the trainer resumes from its newest
checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous_registry

from learner.training.launch import RENDEZVOUS_VARIABLE
from penstock import log, parent
from penstock.errors import ConfigError, TrainingDiverged

_log = logging.getLogger(__name__)

_MONITOR_SECONDS = 0.1


def main(argv: Sequence[str]) -> int:
    """`python -m learner.training.agent NUM_RANKS MODULE -- ARGUMENT ...`. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m learner.training.agent")
    parser.add_argument("num_ranks", type=int)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs="*")
    arguments = parser.parse_args(argv)
    parent.follow(signal.SIGKILL)
    log.configure()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="penstock-ranks-") as folder:
        _prepare_environment(Path(folder), arguments.num_ranks)
        agent = _agent(Path(folder), arguments.num_ranks, arguments.module, arguments.arguments)
        _forward_signals(agent)
        return _status(agent.run())


def _prepare_environment(folder: Path, num_ranks: int) -> None:
    """What the ranks inherit."""
    os.environ[RENDEZVOUS_VARIABLE] = str(folder / "ranks")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    # The agent would open a TCPStore on every interface, which our ranks don't use.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # It would also turn SIGTERM into an exception and so lose the ranks' exit statuses.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"


def _agent(folder: Path, num_ranks: int, module: str, arguments: Sequence[str]) -> LocalElasticAgent:
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint=str(folder / "agents"),
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
        store_type="file",
    )
    spec = WorkerSpec(
        role="trainer",
        local_world_size=num_ranks,
        entrypoint=sys.executable,
        args=("-m", module, *arguments),
        rdzv_handler=rendezvous_registry.get_rendezvous_handler(rendezvous),
        max_restarts=0,
        monitor_interval=_MONITOR_SECONDS,
        local_addr="127.0.0.1",
    )
    return LocalElasticAgent(spec, logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")))


def _forward_signals(agent: LocalElasticAgent) -> None:
    """Hands SIGTERM and SIGINT on to every rank; the agent ends when they have ended."""

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in agent.get_worker_group().workers:
            if isinstance(worker.id, int):
                _signal(worker.id, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        _log.info("rank with pid %d has ended already", pid)


def _status(result: RunResult) -> int:
    """That of a rank whose failure no second try would mend, else 1 if any failed."""
    statuses = {rank: failure.exitcode for rank, failure in result.failures.items()}
    for rank, status in statuses.items():
        _log.info("rank %d ended with status %d", rank, status)
    final = {ConfigError.exit_status, TrainingDiverged.exit_status} & set(statuses.values())
    return max(final) if final else min(len(statuses), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
