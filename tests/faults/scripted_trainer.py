"""A trainer without torch: its weights are a hash of everything that it was trained on.

    python -m tests.faults.scripted_trainer ADDRESS FOLDER --num-steps N

It speaks to the coordinator as the real one does, writes a checkpoint every few steps,
and goes on from the newest. The digest of a version depends on every trajectory of every
step before it, so equal digests mean equal histories. What it did stands in
FOLDER/journal.jsonl, one line each, written before the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from learner.training.coordinator import GrpcCoordinator
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import CHUNK_BYTES, HostTensor
from penstock.weights.segment import SegmentRing, run_prefix

WAIT_SECONDS = 2.0


class ScriptedTrainer:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._folder: Path = arguments.folder
        self._every: int = arguments.checkpoint_every
        self._num_steps: int = arguments.num_steps
        self._step_seconds: float = arguments.step_seconds
        self._ballast_bytes: int = arguments.ballast_bytes
        self._coordinator = GrpcCoordinator(arguments.address)
        self._step, self._state = self._newest_checkpoint()

    def run(self) -> None:
        lineage = self._coordinator.open_lineage(self._step)
        with contextlib.closing(
            SegmentRing(
                name_prefix=run_prefix(lineage.run_id),
                chunk_bytes=CHUNK_BYTES if self._ballast_bytes else 4096,
            )
        ) as ring:
            self._train(lineage.epoch, ring)

    def _train(self, epoch: int, ring: SegmentRing) -> None:
        self._note("open", epoch)
        self._publish(epoch, ring, trained=())
        while self._step < self._num_steps:
            answer = self._coordinator.next_batch(epoch=epoch, step=self._step, wait_seconds=WAIT_SECONDS)
            if answer.stop_requested:
                break
            if answer.batch is None:
                continue
            groups = {
                group.group_id: [each.trajectory_id for each in group.trajectories]
                for group in answer.batch.groups
            }
            time.sleep(self._step_seconds)
            self._note("train", epoch, groups=groups)
            self._state = digest_after(self._state, groups)
            self._step += 1
            self._publish(epoch, ring, trained=list(groups))
            if self._step % self._every == 0:
                self._checkpoint(epoch)
        if self._step >= self._num_steps:
            self._coordinator.finish_run(epoch=epoch, step=self._step)

    def close(self) -> None:
        self._coordinator.close()

    def _publish(self, epoch: int, ring: SegmentRing, *, trained: Sequence[int]) -> None:
        version = PolicyVersion(epoch, self._step)
        data = np.frombuffer(bytes.fromhex(self._state), dtype=np.uint8).copy()
        tensor = HostTensor(name="state", dtype="F32", shape=(len(data) // 4,), data=data)
        manifest = ring.write(version, [tensor, *self._ballast(data)])
        self._note("publish", epoch, digest=manifest.digest)
        self._coordinator.publish_version(version, manifest, {}, trained)

    def _ballast(self, state: NDArray[np.uint8]) -> list[HostTensor]:
        """A tensor that weighs something, and is another in every version."""
        if not self._ballast_bytes:
            return []
        data = np.resize(state, self._ballast_bytes)
        return [HostTensor(name="ballast", dtype="F32", shape=(self._ballast_bytes // 4,), data=data)]

    def _checkpoint(self, epoch: int) -> None:
        path = self._folder / f"checkpoint-{self._step:06d}.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps({"step": self._step, "state": self._state}))
        aside.replace(path)
        self._coordinator.record_checkpoint(epoch=epoch, step=self._step, path=str(path), digest=self._state)

    def _newest_checkpoint(self) -> tuple[int, str]:
        paths = sorted(self._folder.glob("checkpoint-*.json"))
        if not paths:
            return 0, "00" * 32
        found = json.loads(paths[-1].read_text())
        return found["step"], found["state"]

    def _note(self, op: str, epoch: int, **more: object) -> None:
        line = {"op": op, "epoch": epoch, "step": self._step, **more}
        with (self._folder / "journal.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def digest_after(state: str, groups: dict[int, list[str]]) -> str:
    """The weights that come of a step."""
    text = json.dumps({"before": state, "groups": groups}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-steps", type=int, required=True)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--ballast-bytes", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=2)
    trainer = ScriptedTrainer(parser.parse_args())
    try:
        trainer.run()
    finally:
        trainer.close()


if __name__ == "__main__":
    main()
