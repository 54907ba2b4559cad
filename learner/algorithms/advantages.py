"""How much better than expected each trajectory was, from rewards alone. Advantages per token: gae.py.

Each takes the rewards of every group of a step, [G] float64 a group, and returns as
many advantages. Equal rewards, and a group of one, give exactly 0. Variances are those
of centred rewards, never E[x^2] - E[x]^2, which cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

STD_EPSILON = 1e-6
"""Added to a standard deviation before dividing by it."""

Rewards = Sequence[torch.Tensor]


def group_mean(groups: Rewards) -> list[torch.Tensor]:
    """r - mean(r) over the group: Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training")."""
    return [_centred(rewards_G) for rewards_G in groups]


def group_std(groups: Rewards) -> list[torch.Tensor]:
    """(r - mean(r)) / std(r) over the group: GRPO (Shao et al. 2024, section 4.1.2).

    The sample's standard deviation (n - 1), plus 1e-6.
    """
    return [centred_G / _std(centred_G) for centred_G in group_mean(groups)]


def leave_one_out(groups: Rewards) -> list[torch.Tensor]:
    """r_i minus the mean of the others of its group: RLOO (Ahmadian et al. 2024)."""
    return [_centred(rewards_G) * _of_others(rewards_G.numel()) for rewards_G in groups]


def batch_std(groups: Rewards) -> list[torch.Tensor]:
    """(r - mean) / std, both over the whole step: REINFORCE++ (Hu et al. 2025)."""
    flat = _centred(torch.cat(list(groups)))
    return _like(groups, flat / _std(flat))


def group_mean_batch_std(groups: Rewards) -> list[torch.Tensor]:
    """The group's mean is subtracted, the step's deviation divides: REINFORCE++-baseline (Hu et al. 2025)."""
    flat = _centred(torch.cat(group_mean(groups)))
    return _like(groups, flat / _std(flat))


def _centred(rewards: torch.Tensor) -> torch.Tensor:
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return rewards - rewards.mean()


def _std(centred: torch.Tensor) -> torch.Tensor:
    variance = centred.square().sum() / max(centred.numel() - 1, 1)
    return variance.sqrt() + STD_EPSILON


def _of_others(num: int) -> float:
    """n / (n - 1): turns the distance from the mean of all into that from the mean of the others."""
    return num / (num - 1) if num > 1 else 0.0


def _like(groups: Rewards, flat: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.split(flat, [rewards_G.numel() for rewards_G in groups]))
