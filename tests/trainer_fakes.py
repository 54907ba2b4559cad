"""Stand-ins for what surrounds the trainer: a coordinator in memory, a sink for weights, batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from learner.training.batch import Batch, Group
from learner.training.coordinator import Lineage, NextBatch
from penstock.trajectory import (
    FinishReason,
    PolicyVersion,
    Reward,
    Task,
    Trajectory,
    VersionSpan,
)
from penstock.weights.manifest import HostTensor, Manifest

VERSION = PolicyVersion(1, 0)


def make_trajectory(
    *,
    num_prompt: int = 4,
    num_sampled: int = 5,
    reward: float = 1.0,
    seed: int = 0,
    versions: Sequence[VersionSpan] | None = None,
    logprob: float = -2.0,
    vocab_size: int = 40,
) -> Trajectory:
    """Random tokens; log-probabilities scatter a little around `logprob`."""
    generator = np.random.default_rng(seed)
    num_tokens = num_prompt + num_sampled
    loss_mask = np.zeros(num_tokens, dtype=np.uint8)
    loss_mask[num_prompt:] = 1
    noise = generator.uniform(-0.3, 0.3, num_tokens)
    return Trajectory(
        trajectory_id=f"{seed:032x}",
        lease_id=f"lease-{seed}",
        token_ids=generator.integers(3, vocab_size, num_tokens).astype(np.int32),
        loss_mask=loss_mask,
        logprobs=np.where(loss_mask == 1, logprob + noise, 0.0).astype(np.float32),
        versions=tuple(versions or (VersionSpan(VERSION, num_sampled),)),
        reward=Reward.valid(reward),
        finish_reason=FinishReason.DONE,
        num_turns=1,
        task=Task("echo", "train", 0, 0),
        environment_version="1",
        environment_digest="0",
        observation_digest="0",
    )


def make_batch(step: int = 0, *, num_groups: int = 3, group_size: int = 4, seed: int = 0) -> Batch:
    """Groups of trajectories of many lengths, with rewards of 0 and 1."""
    generator = np.random.default_rng((seed, step))
    groups = []
    for group_id in range(num_groups):
        num_prompt = int(generator.integers(2, 8))
        trajectories = tuple(
            make_trajectory(
                num_prompt=num_prompt,
                num_sampled=int(generator.integers(1, 12)),
                reward=float(slot % 2),
                seed=((seed * 1000 + step) * 100 + group_id) * 100 + slot,
            )
            for slot in range(group_size)
        )
        groups.append(Group(group_id=group_id, trajectories=trajectories))
    return Batch(step=step, groups=tuple(groups))


@dataclass(slots=True)
class FakeCoordinator:
    """Hands out batches made by a function of the step, and writes down what it is told."""

    make: Callable[[int], Batch] = make_batch
    epoch: int = 1
    stop_at: int | None = None
    """Asks to stop at this step."""
    checkpoint_at: int | None = None
    calls: list[str] = field(default_factory=list)
    """Such as "open 0", "publish 1.0", "checkpoint 2", "skip 3", "finish 4"."""
    metrics: dict[int, Mapping[str, float]] = field(default_factory=dict)
    manifests: dict[int, Manifest] = field(default_factory=dict)
    deltas_wanted: bool = False

    def open_lineage(self, step: int) -> Lineage:
        self.calls.append(f"open {step}")
        return Lineage(run_id="run", epoch=self.epoch)

    def next_batch(self, *, epoch: int, step: int, wait_seconds: float) -> NextBatch:
        return NextBatch(
            batch=self.make(step),
            stop_requested=step == self.stop_at,
            checkpoint_requested=step == self.checkpoint_at,
        )

    def publish_version(
        self, version: PolicyVersion, manifest: Manifest, metrics: Mapping[str, float], trained: Sequence[int]
    ) -> bool:
        self.calls.append(f"publish {version}")
        self.metrics[version.step] = metrics
        self.manifests[version.step] = manifest
        return self.deltas_wanted

    def skip_step(self, *, epoch: int, step: int, reason: str) -> None:
        self.calls.append(f"skip {step}")

    def record_checkpoint(self, *, epoch: int, step: int, path: str, digest: str) -> None:
        self.calls.append(f"checkpoint {step}")

    def finish_run(self, *, epoch: int, step: int) -> None:
        self.calls.append(f"finish {step}")


class TensorSink:
    """Keeps the newest version's tensors."""

    def __init__(self) -> None:
        self.tensors: list[HostTensor] = []

    def write(
        self, version: PolicyVersion, tensors: Sequence[HostTensor], *, with_delta: bool = False
    ) -> Manifest:
        self.tensors = list(tensors)
        return Manifest(version=version, tensors=(), num_bytes=0, chunk_bytes=1, chunk_digests=(), digest="0")


class NeverStop:
    def is_set(self) -> bool:
        return False
