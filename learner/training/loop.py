"""The training loop.

    consumes     orders: batches, requests for a checkpoint, a stop (orders.py)
    waits for    the coordinator's next batch
    produces     a version a step, checkpoints, metrics

What the loop does in addition (timing, metrics, checkpoints) comes in as objects with
one verb each; every rank runs the same loop on the same orders.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.training.batch import Batch
from learner.training.checkpoint import Checkpoints
from learner.training.config import EVALUATION
from learner.training.coordinator import Coordinator
from learner.training.orders import Leave, Orders, Train, Wait, WriteCheckpoint
from learner.training.parallel import Ranks
from learner.training.publish import Publishes
from learner.training.retention import Means
from learner.training.step import Algorithm
from penstock.errors import ConfigError, TrainingDiverged
from penstock.trajectory import PolicyVersion

_log = logging.getLogger(__name__)

MAX_SKIPS = 3
"""Steps in a row that may fail before the run stops."""


@dataclass(slots=True, kw_only=True)
class Position:
    """Where training is."""

    epoch: int
    step: int
    weights: str = ""
    """Digest of the version's weights, as rank 0 published them."""

    @property
    def version(self) -> PolicyVersion:
        return PolicyVersion(self.epoch, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The parts of a run, on one rank."""

    num_steps: int
    position: Position
    learning_rate: Callable[[int], float]
    """Of the step that starts from version `step`."""
    algorithm: Algorithm
    orders: Orders
    versions: Versions
    checkpoints: CheckpointLog
    skips: Skips

    def run(self) -> bool:
        """Trains from `position` to the last step, or until a stop. Returns whether the run is complete."""
        position = self.position
        position.weights = self.versions.publish(position.version, {}, trained=())
        for order in self.orders.until(self.num_steps):
            match order:
                case Leave():
                    break
                case WriteCheckpoint():
                    self.checkpoints.write(position)
                case Wait():
                    self.checkpoints.finish_written()
                case Train(batch=batch):
                    started = time.monotonic()
                    rate = self.learning_rate(position.step)
                    report = self.algorithm.step(batch, position.version, learning_rate=rate)
                    if report.failure:
                        self.skips.skip(position, batch, report.failure)
                        continue
                    self.skips.reset()
                    position.step += 1
                    timing = {"step_seconds": time.monotonic() - started, "wait_seconds": order.wait_seconds}
                    position.weights = self.versions.publish(
                        position.version, report.metrics | timing, trained=batch.group_ids()
                    )
                    self.checkpoints.after_step(position, report.metrics)
        self.checkpoints.write(position)
        return position.step >= self.num_steps


class Versions:
    """Publishes versions: weights first, then the coordinator's journal, then the metrics file."""

    def __init__(
        self, publisher: Publishes, coordinator: Coordinator, ranks: Ranks, metrics_path: Path
    ) -> None:
        self._publisher = publisher
        self._coordinator = coordinator
        self._ranks = ranks
        self._metrics_path = metrics_path

    def publish(self, version: PolicyVersion, metrics: Mapping[str, float], *, trained: Sequence[int]) -> str:
        """Every rank calls it. When it returns, actors may install the version. Rank 0 gets the weights' digest.

        trained: the groups that the step before it trained on.
        """
        started = time.monotonic()
        manifest = self._publisher.write(version)
        if not self._ranks.is_first:
            return ""
        assert manifest is not None
        if metrics:
            metrics = {**metrics, "publish_seconds": time.monotonic() - started}
        self._publisher.deltas_wanted = self._coordinator.publish_version(version, manifest, metrics, trained)
        if metrics:
            self._record(version, metrics, trained)
        return manifest.digest

    def _record(self, version: PolicyVersion, metrics: Mapping[str, float], trained: Sequence[int]) -> None:
        line = {"version": str(version), "step": version.step, "time": time.time(), **metrics}
        line["groups"] = list(trained)
        with self._metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        _log.info(
            "version %s: reward %.3f, loss %.4f, lag %.1f (max %d), %.2f s after %.2f s of waiting",
            version, metrics["reward_mean"], metrics["loss"], metrics["lag_mean"], metrics["lag_max"],
            metrics["step_seconds"], metrics["wait_seconds"],
        )  # fmt: skip


class CheckpointLog:
    """Writes checkpoints when they are due, and tells the coordinator of each."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        coordinator: Coordinator,
        ranks: Ranks,
        *,
        every_steps: int,
        in_background: bool = False,
        metric: str = "",
    ) -> None:
        """metric: what checkpoints are kept by, if they are."""
        self._checkpoints = checkpoints
        self._coordinator = coordinator
        self._ranks = ranks
        self._every_steps = every_steps
        self._in_background = in_background
        self._awaited = "" if metric.startswith(EVALUATION) else metric
        """The metric, until a step had it."""
        self._means = Means()
        self._written = 0
        """Of the newest checkpoint: on disk, or on its way there."""
        self._pending: Position | None = None

    def resume(self) -> int:
        self._written = self._checkpoints.resume()
        return self._written

    def after_step(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Begins the checkpoint that is due; tells of one that has meanwhile reached the disk.

        metrics: of the step. Raises ConfigError if no step had the one that checkpoints are kept by
        when the first of them is due: some metrics are of some steps only.
        """
        is_due = position.step % self._every_steps == 0
        if self._awaited in metrics:
            self._awaited = ""
        elif self._awaited and is_due:
            raise ConfigError(
                f"training.checkpoint.metric is {self._awaited}, which steps of this run do not have; expected one "
                f"of {', '.join(sorted(metrics))}"
            )
        self._means.add(metrics)
        self.finish_written()
        if is_due:
            self._begin(position)
            if not self._in_background:
                self._finish()

    def finish_written(self) -> None:
        """Names one that has meanwhile reached the disk, and tells of it. Every rank calls it."""
        if self._pending is not None and self._checkpoints.is_written():
            self._finish()

    def write(self, position: Position) -> None:
        """Has the position's checkpoint on disk when it returns. Version 0 needs none."""
        self._begin(position)
        self._finish()

    def _begin(self, position: Position) -> None:
        """Unless it is written already. Waits for the one before."""
        if position.step == self._written:
            return
        self._finish()
        self._checkpoints.begin(
            position.step, self._means.take(), epoch=position.epoch, weights=position.weights
        )
        self._written, self._pending = position.step, dataclasses.replace(position)

    def _finish(self) -> None:
        if self._pending is None:
            return
        started, position = time.monotonic(), self._pending
        checkpoint = self._checkpoints.finish()
        self._pending = None
        if self._ranks.is_first:
            self._coordinator.record_checkpoint(
                epoch=position.epoch,
                step=position.step,
                path=str(checkpoint.path),
                digest=checkpoint.digest,
            )
            _log.info("checkpoint %s, after %.2f s of waiting", checkpoint.path, time.monotonic() - started)


class Skips:
    """Counts steps that failed in a row; the run stops after MAX_SKIPS."""

    def __init__(self, coordinator: Coordinator, ranks: Ranks) -> None:
        self._coordinator = coordinator
        self._ranks = ranks
        self._ids: list[str] = []
        self._in_a_row = 0

    def skip(self, position: Position, batch: Batch, reason: str) -> None:
        """Has the batch quarantined. Raises TrainingDiverged, naming trajectories, when it is one too many."""
        self._in_a_row += 1
        self._ids += [trajectory.trajectory_id for trajectory in batch.trajectories()]
        _log.error("step %d is skipped: %s", position.step, reason)
        if self._ranks.is_first:
            self._coordinator.skip_step(epoch=position.epoch, step=position.step, reason=reason)
        if self._in_a_row == MAX_SKIPS:
            raise TrainingDiverged(
                f"{MAX_SKIPS} steps in a row failed ({reason}); their trajectories are quarantined: "
                + " ".join(self._ids)
            )

    def reset(self) -> None:
        self._in_a_row = 0
        self._ids.clear()
