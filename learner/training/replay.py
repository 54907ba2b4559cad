"""One rank of a replay: the run's trainer, with the ledger in the coordinator's place.

python -m learner.training.replay RUN_DIR OUT_DIR
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from learner.config import RunConfig
from learner.coordinator import database, segments, tables
from learner.training.batch import Batch, Group
from learner.training.coordinator import Lineage, NextBatch
from learner.training.start import join_ranks, train
from learner.training.stopping import StopOnSignal
from penstock import config as configuration
from penstock import log, parent
from penstock.cli import run as run_program
from penstock.codec import trajectory_from_wire
from penstock.errors import LedgerError, PenstockError, ProtocolError
from penstock.trajectory import PolicyVersion
from penstock.v1 import trajectory_pb2
from penstock.weights.manifest import Manifest

_log = logging.getLogger(__name__)


class RecordedRun:
    """What a ledger recorded, as the training loop's coordinator. Raises PenstockError for a version that differs."""

    def __init__(self, path: Path) -> None:
        self._db = database.open_reader(path)
        self._folder = segments.folder_of(path)
        self.run_id = str(self._rows("SELECT value FROM meta WHERE name = 'run_id'")[0][0])
        self._epochs: dict[int, int] = dict(
            self._db.execute("SELECT step, max(epoch) FROM versions GROUP BY step")
        )
        self.num_compared = 0

    def open_lineage(self, step: int) -> Lineage:
        return Lineage(run_id=f"{self.run_id}-replay", epoch=max(self._epochs.values()))

    def next_batch(self, *, epoch: int, step: int, wait_seconds: float) -> NextBatch:
        ids = self._rows(
            "SELECT group_id FROM groups WHERE state = 'trained' AND step = ? ORDER BY group_id", step
        )
        if not ids:
            return NextBatch(batch=None, stop_requested=True)
        return NextBatch(batch=Batch(step=step, groups=tuple(self._group(group_id) for (group_id,) in ids)))

    def publish_version(
        self, version: PolicyVersion, manifest: Manifest, metrics: Mapping[str, float], trained: Sequence[int]
    ) -> bool:
        """Compares a version with the one that the run published at that step."""
        recorded = self._rows(
            "SELECT digest FROM versions WHERE epoch = ? AND step = ?",
            self._epochs[version.step],
            version.step,
        )[0][0]
        if manifest.digest != recorded:
            raise PenstockError(
                f"the version of step {version.step} has digest {manifest.digest[:16]} here; the run published "
                f"{recorded[:16]}. Bits are the same only with the same policy, settings, number of ranks and "
                "threads, device and release of torch"
            )
        self.num_compared += 1
        return False

    def skip_step(self, *, epoch: int, step: int, reason: str) -> None:
        raise PenstockError(f"step {step} is not finite here ({reason}); in the run it was trained")

    def record_checkpoint(self, *, epoch: int, step: int, path: str, digest: str) -> None:
        """The ledger is only read."""

    def finish_run(self, *, epoch: int, step: int) -> None:
        """The ledger is only read."""

    def _group(self, group_id: int) -> Group:
        rows = self._rows(
            "SELECT trajectory_id, segment, offset, num_bytes, checksum FROM trajectories "
            "WHERE group_id = ? AND state = 'trained' ORDER BY slot",
            group_id,
        )
        for trajectory_id, segment, *_ in rows:
            if segment is None:
                raise ProtocolError(f"trajectory {trajectory_id} was trained on, but its payload is gone")
        found = segments.read(self._folder, tables.places(row[1:] for row in rows))
        payloads = []
        for (trajectory_id, *_), payload in zip(rows, found, strict=True):
            if payload is None:
                raise LedgerError(
                    f"{self._folder}: the payload of trajectory {trajectory_id} was changed on the disk"
                )
            payloads.append(trajectory_from_wire(trajectory_pb2.Trajectory.FromString(payload)))
        return Group(group_id=group_id, trajectories=tuple(payloads))

    def _rows(self, sql: str, *parameters: int) -> list[Any]:
        return self._db.execute(sql, parameters).fetchall()


def main(argv: Sequence[str]) -> int:
    """Trains from the checkpoint in OUT_DIR, or the initial policy, to the last recorded step."""
    run_dir, out = map(Path, argv)
    stop = StopOnSignal()
    stop.listen()
    parent.follow(signal.SIGKILL)
    log.configure()
    config = configuration.load(
        RunConfig, [str(run_dir / "config.toml")], prog="penstock replay", description=""
    )
    checkpoint = dataclasses.replace(config.training.checkpoint, every_steps=sys.maxsize)
    config = dataclasses.replace(
        config, run_dir=out, training=dataclasses.replace(config.training, checkpoint=checkpoint)
    )
    recorded = RecordedRun(run_dir / "ledger.sqlite")
    with ExitStack() as stack:
        ranks = join_ranks(config.training)
        stack.callback(ranks.close)
        position = train(config, ranks, recorded, stop, stack)
        if ranks.is_first and not stop.is_set():
            print(  # noqa: T201
                f"replayed run {recorded.run_id} to step {position.step}: {recorded.num_compared} versions have the "
                "digests that they had"
            )
    stop.finished()
    return 0


if __name__ == "__main__":
    sys.exit(run_program("learner.training.replay:main", sys.argv[1:]))
