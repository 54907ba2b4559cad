"""Generalised advantage estimation (Schulman et al. 2016, eq. 16) over the sampled tokens of one trajectory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def token_advantages(
    rewards_S: Floats, values_S: Floats, *, gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """delta_t = r_t + gamma V_{t+1} - V_t;  A_t = sum_l (gamma lam)^l delta_{t+l};  the value's target is A_t + V_t.

    rewards_S: [S] float64, the reward that follows each sampled token (a trajectory's own
    comes with its last). values_S: [S] float64, the critic's estimate before each. Tokens
    that the environment wrote are no steps: the last token of a turn is followed by the
    first of the next. After the last token the value is 0. Returns (advantages_S, targets_S).
    """
    advantages_S = np.zeros_like(values_S)
    later = 0.0
    next_value = 0.0
    for t in range(len(values_S) - 1, -1, -1):
        delta = rewards_S[t] + gamma * next_value - values_S[t]
        later = delta + gamma * lam * later
        advantages_S[t] = later
        next_value = values_S[t]
    return advantages_S, advantages_S + values_S


def whitened(advantages: list[Floats]) -> list[Floats]:
    """Shifts and scales the advantages of all tokens of a step to mean 0 and deviation 1; all 0 if they are equal."""
    flat = np.concatenate(advantages)
    centred = flat - flat.mean()
    deviation = np.sqrt(np.mean(np.square(centred)))
    scaled = centred / (deviation + 1e-8) if np.ptp(flat) else np.zeros_like(flat)
    return np.split(scaled, np.cumsum([len(part) for part in advantages])[:-1])
