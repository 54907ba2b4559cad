"""What a long run's ledger costs: to start a coordinator on it, to count it, to check it.

Writes a ledger of a million trajectories as a run would have left it, through the records
that a run writes: groups of 16 leased, filled and trained 32 at a time, a checkpoint every 50
steps, which lets payloads go, and one batch pending. Then, each in a process of its own:

- start_seconds: opens it and restores a scheduler, which is what a coordinator does before it
  serves; of that open_seconds (every page verified, tallies counted anew, what is pending
  read), recover_seconds (open groups, live leases) and ids_seconds (the ids of all);
- start_rss_mb: peak memory of that process;
- totals_ms: what is counted once a second, and for each `penstock status`;
- audit_seconds, audit_rss_mb: `penstock ledger`.

    python benchmarks/ledger.py [--num-trajectories N] [--json FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from harness.report import add_arguments, write

from learner.coordinator.audit import audit
from learner.coordinator.known_ids import KnownIds
from learner.coordinator.ledger import Ledger
from learner.coordinator.records import (
    BatchAssigned,
    BatchTrained,
    CheckpointWritten,
    GroupOpened,
    LeaseGranted,
    LineageOpened,
    Record,
    SessionOpened,
    TrajectoryState,
    TrajectoryStored,
    VersionPublished,
)
from penstock.codec import checksum
from penstock.trajectory import PolicyVersion, Task

GROUP_SIZE = 16
GROUPS_PER_STEP = 32
CHECKPOINT_STEPS = 50
PAYLOAD = bytes(1000)
SESSION = "0" * 32


def make_ledger(path: Path, num_trajectories: int) -> None:
    ledger = Ledger(path)
    num_steps = num_trajectories // (GROUP_SIZE * GROUPS_PER_STEP)
    ledger.write_blocking(
        [
            SessionOpened(session_id=SESSION, actor_id="actor", number=1),
            LineageOpened(epoch=1, step=0, max_lag=2),
            VersionPublished(version=PolicyVersion(1, 0), digest="0", manifest=b"", metrics="{}"),
        ]
    )
    for step in range(num_steps):
        ledger.write_blocking([*_batch(step), *(_trained(step) if step < num_steps - 1 else ())])
    ledger.close()


def _batch(step: int) -> Iterator[Record]:
    for group_id in range(step * GROUPS_PER_STEP, (step + 1) * GROUPS_PER_STEP):
        task = Task("words", "train", group_id, group_id)
        yield GroupOpened(group_id=group_id, task=task, born=PolicyVersion(1, step), num_slots=GROUP_SIZE)
        for slot in range(GROUP_SIZE):
            yield LeaseGranted(group_id=group_id, slot=slot, attempt=0, session_id=SESSION)
            number = group_id * GROUP_SIZE + slot + 1
            yield TrajectoryStored(
                trajectory_id=f"{checksum(number.to_bytes(8, 'little')):032x}",
                group_id=group_id,
                slot=slot,
                attempt=0,
                session_id=SESSION,
                sequence=number,
                state=TrajectoryState.PENDING,
                environment="words",
                oldest_step=step,
                num_sampled=768,
                mixed=False,
                reward=float(slot % 2),
                observation_digest=f"{group_id:064x}",
                payload=PAYLOAD,
                checksum=checksum(PAYLOAD),
            )


def _trained(step: int) -> Iterator[Record]:
    group_ids = tuple(range(step * GROUPS_PER_STEP, (step + 1) * GROUPS_PER_STEP))
    yield BatchAssigned(step=step, group_ids=group_ids)
    yield BatchTrained(step=step, group_ids=group_ids)
    version = PolicyVersion(1, step + 1)
    yield VersionPublished(version=version, digest=str(step + 1), manifest=b"", metrics="{}")
    if version.step % CHECKPOINT_STEPS == 0:
        yield CheckpointWritten(version=version, path=f"step-{version.step}", digest="", keep=2)


def start(path: Path) -> Mapping[str, float]:
    began = time.perf_counter()
    ledger = Ledger(path)
    opened = time.perf_counter()
    found = ledger.recover()
    recovered = time.perf_counter()
    known = KnownIds()
    known.update(ledger.trajectory_ids())
    ended = time.perf_counter()
    assert len(found.open_groups) == GROUPS_PER_STEP
    ledger.totals()
    totals_began = time.perf_counter()
    totals = ledger.totals()
    totals_seconds = time.perf_counter() - totals_began
    assert totals.imbalance == 0
    assert totals.accepted == len(known)
    ledger.close()
    return {
        "start_seconds": ended - began,
        "open_seconds": opened - began,
        "recover_seconds": recovered - opened,
        "ids_seconds": ended - recovered,
        "totals_ms": 1e3 * totals_seconds,
        "start_rss_mb": _peak_rss_mb(),
    }


def check(path: Path) -> Mapping[str, float]:
    began = time.perf_counter()
    found = audit(path)
    seconds = time.perf_counter() - began
    assert not found.violations, found.violations
    return {"audit_seconds": seconds, "audit_rss_mb": _peak_rss_mb()}


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _alone(measure: Callable[[Path], Mapping[str, float]], path: Path) -> Mapping[str, float]:
    """In a process of its own, so that its memory is its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.Process(target=_measure, args=(measure, path, theirs))
    child.start()
    theirs.close()
    found: Mapping[str, float] = ours.recv()
    child.join()
    return found


def _measure(measure: Callable[[Path], Mapping[str, float]], path: Path, pipe: Connection) -> None:
    pipe.send(measure(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-trajectories", type=int, default=1_000_000)
    add_arguments(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        make_ledger(path, arguments.num_trajectories)
        results = {"ledger_mb": path.stat().st_size / 2**20, **_alone(start, path), **_alone(check, path)}
    write(results, arguments)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
