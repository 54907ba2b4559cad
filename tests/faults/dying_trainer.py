"""The real trainer, which kills itself at one point of a step.

    python -m tests.faults.dying_trainer POINT RUN_DIR --coordinator HOST:PORT

A point is passed once by each step or checkpoint; this process dies the second time, so
that it has made something that must not be lost.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from learner.training import checkpoint, start
from learner.training.checkpoint import Checkpoints
from learner.training.coordinator import GrpcCoordinator
from learner.training.updater import Updater
from penstock.weights import segment
from penstock.weights.segment import SegmentRing

PASSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A function of the trainer, and what happens instead of its last call."""

    owner: Any
    name: str
    instead: Callable[[Callable[..., Any]], Callable[..., Any]]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: die()


def after(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: (call(*arguments, **named), die())


def half_a_shard(call: Callable[..., Any]) -> Callable[..., Any]:
    def write(state: Any, path: Path) -> None:
        save_file(state, path)
        os.truncate(path, path.stat().st_size // 2)
        die()

    return write


def half_a_version(call: Callable[..., Any]) -> Callable[..., Any]:
    def write(payload: Any, *arguments: Any) -> None:
        payload[: payload.size // 2] = 255
        die()

    return write


POINTS = {
    "in a step, between gradients and weights": Point(owner=Updater, name="_totals", instead=before),
    "after the optimiser's step": Point(owner=Updater, name="update", instead=after),
    "with half a shard of a checkpoint": Point(owner=checkpoint, name="save_file", instead=half_a_shard),
    "with a checkpoint not synced": Point(owner=checkpoint, name="_sync", instead=before),
    "before a checkpoint's rename": Point(owner=checkpoint, name="_replace", instead=before),
    "after a checkpoint's rename": Point(owner=checkpoint, name="_replace", instead=after),
    "after the deletion of old checkpoints": Point(owner=Checkpoints, name="_delete_old", instead=after),
    "after a checkpoint was recorded": Point(owner=GrpcCoordinator, name="record_checkpoint", instead=after),
    "with half a version in shared memory": Point(owner=segment, name="pack", instead=half_a_version),
    "with a version nobody heard of": Point(owner=SegmentRing, name="fill", instead=after),
    "with a version the coordinator heard of": Point(
        owner=GrpcCoordinator, name="publish_version", instead=after
    ),
}


def arm(point: Point) -> None:
    """Has the point's second pass kill this process."""
    call = getattr(point.owner, point.name)
    passes = 0

    def passed(*arguments: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        return (point.instead(call) if passes == PASSES else call)(*arguments, **named)

    setattr(point.owner, point.name, passed)


if __name__ == "__main__":
    arm(POINTS[sys.argv[1]])
    start.main(sys.argv[2:])
