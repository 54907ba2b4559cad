"""Adds what rows and ranks measured, and turns the totals into what is reported.

A name ends in `_sum` (added) or `_max` (the larger one is kept).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

Sums = Mapping[str, torch.Tensor]


def add_sums(parts: Iterable[Sums]) -> dict[str, torch.Tensor]:
    """Combines the measurements of several rows. Each value is a float32 or float64 scalar."""
    totals: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, value in part.items():
            value = value.detach().double()
            if name not in totals:
                totals[name] = value
            elif name.endswith("_max"):
                totals[name] = torch.maximum(totals[name], value)
            else:
                totals[name] = totals[name] + value
    return totals


def share(part: float, whole: float) -> float:
    """part / whole, and 0 of nothing."""
    return part / whole if whole else 0.0
