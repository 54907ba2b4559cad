"""A learner without its network: scheduler, ledger, trainer and actor in one process that may be killed anywhere.

    python -m tests.faults.durable_loop FOLDER

What the actor sent and what it was told lie in files of their own, as they would in an
actor that survives. Started again in the same folder, the learner goes on from its
checkpoint and the actor sends again what was not acknowledged. Everything is a function
of what is on disk, so however often it dies, the steps must be made of the same ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from learner.coordinator.decisions import Batch
from learner.coordinator.ledger import Ledger
from learner.coordinator.records import TrajectoryState
from learner.coordinator.scheduler import Scheduler
from penstock.trajectory import Lease, PolicyVersion
from penstock.v1 import trajectory_pb2
from tests.unit.learner.coordinator.fakes import (
    Submitter,
    acquire,
    digest_of,
    join,
    make_message,
    make_scheduler,
    publish,
    restore,
)

NUM_STEPS = 5
GROUPS_PER_STEP = 2
GROUP_SIZE = 2
CHECKPOINT_EVERY = 2
LONG_AFTER = 1000.0


class DurableLoop:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ledger = Ledger(folder / "ledger.sqlite", segment_bytes=1000)
        self._scheduler: Scheduler = make_scheduler(
            history=self._ledger,
            groups_per_step=GROUPS_PER_STEP,
            group_size=GROUP_SIZE,
            max_lag=1,
            num_steps=NUM_STEPS,
        )
        restore(self._scheduler, self._ledger.recover())
        # The actor lost its rollouts with the learner: their leases run out.
        self._scheduler.tick(now=LONG_AFTER)

    def run(self) -> None:
        checkpoint = self._read("checkpoint", default=0)
        epoch = self._scheduler.lineage.open(checkpoint, self._ledger.groups_trained_from(checkpoint))
        version = publish(self._scheduler, PolicyVersion(epoch, checkpoint))
        self._commit()
        submit = Submitter(self._scheduler, join(self._scheduler, f"a{epoch}"))
        self._send_again(submit)
        while version.step < NUM_STEPS:
            self._play(submit, version)
            version = self._step(version)
        self._scheduler.lineage.finish(epoch, version.step)
        self._commit()
        self._ledger.close()

    def _play(self, submit: Submitter, version: PolicyVersion) -> None:
        """All that may be leased, one after another; more than one result to a commit now and then."""
        for lease in acquire(self._scheduler, submit.session_id, version):
            self._commit()
            self._send(submit, lease, version)

    def _step(self, version: PolicyVersion) -> PolicyVersion:
        batch = self._scheduler.lineage.next_batch(version.epoch, version.step)
        assert isinstance(batch, Batch), batch
        self._commit()
        version = publish(self._scheduler, PolicyVersion(version.epoch, version.step + 1))
        self._commit()
        if version.step % CHECKPOINT_EVERY == 0:
            self._write("checkpoint", version.step)
            self._scheduler.lineage.checkpointed(version, "checkpoint", digest_of(version), keep=1)
            self._commit()
        return version

    def _send(self, submit: Submitter, lease: Lease, version: PolicyVersion) -> None:
        message = make_message(lease, version, trajectory_id=trajectory_id(lease.group_id, lease.slot))
        self._note("sent", message.SerializeToString().hex())
        verdict = submit(message)
        assert verdict.state is TrajectoryState.PENDING or verdict.is_duplicate, verdict
        self._commit()
        self._note("acknowledged", message.trajectory_id)

    def _send_again(self, submit: Submitter) -> None:
        """What the actor holds yet, because it heard nothing of it."""
        known = set(self.acknowledged(self._folder))
        for line in self._lines("sent"):
            message = trajectory_pb2.Trajectory.FromString(bytes.fromhex(line))
            if message.trajectory_id not in known:
                verdict = submit(message)
                assert verdict.code is None, verdict
                self._commit()
                self._note("acknowledged", message.trajectory_id)

    def _commit(self) -> None:
        self._scheduler.take_revocations()
        self._ledger.write_blocking(self._scheduler.take_records())

    # -- the files of those who survive ---------------------------------------------------

    @staticmethod
    def acknowledged(folder: Path) -> list[str]:
        path = folder / "acknowledged"
        return path.read_text().split() if path.exists() else []

    def _lines(self, name: str) -> list[str]:
        path = self._folder / name
        return path.read_text().split() if path.exists() else []

    def _note(self, name: str, line: str) -> None:
        with (self._folder / name).open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")

    def _read(self, name: str, *, default: Any) -> Any:
        path = self._folder / name
        return json.loads(path.read_text()) if path.exists() else default

    def _write(self, name: str, value: Any) -> None:
        aside = self._folder / f".{name}"
        aside.write_text(json.dumps(value))
        aside.replace(self._folder / name)


def trajectory_id(group_id: int, slot: int) -> str:
    """Whoever plays a slot, and however often, makes the same trajectory of it."""
    return f"{group_id:016x}{slot:016x}"


if __name__ == "__main__":
    DurableLoop(Path(sys.argv[1])).run()
