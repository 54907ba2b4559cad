"""One step's groups, as the coordinator hands them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from penstock.trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    group_id: int
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The groups from which version step + 1 is made."""

    step: int
    groups: tuple[Group, ...]

    def group_ids(self) -> tuple[int, ...]:
        return tuple(group.group_id for group in self.groups)

    def trajectories(self) -> Iterator[Trajectory]:
        for group in self.groups:
            yield from group.trajectories

    def fingerprint(self) -> int:
        """Equal for equal batches: lets ranks see that they got the same one. 48 bits."""
        digest = blake3(str(self.step).encode())
        for trajectory in self.trajectories():
            digest.update(trajectory.trajectory_id.encode())
        return int.from_bytes(digest.digest()[:6], "little")


def batch_metrics(batch: Batch) -> dict[str, float]:
    """Rewards, and lag: the step trained on minus the oldest version's step in a trajectory, at least 0."""
    rewards = np.array([trajectory.reward.value for trajectory in batch.trajectories()], dtype=np.float64)
    lags = np.array([max(0, batch.step - t.oldest.step) for t in batch.trajectories()], dtype=np.float64)
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "lag_mean": float(lags.mean()),
        "lag_p95": float(np.percentile(lags, 95)),
        "lag_max": float(lags.max()),
        "tokens": float(sum(trajectory.num_sampled for trajectory in batch.trajectories())),
        "num_trajectories": float(len(rewards)),
    }
