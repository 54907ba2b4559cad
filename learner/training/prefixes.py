"""What the sequences of a row have in common at their beginnings is computed once.

Siblings of a group share their prompt, and often more; what a token's state is depends on
the tokens up to it alone. So a row is a forest: one node for every beginning that is there. All layers
see nodes, but attention, which lays the branches out as sequences again, each from its
root. Nothing is computed behind the last token that a prediction is read off.

T   tokens of the row        U   nodes        E   tokens of the branches, end to end
S   sampled tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from learner.training.transfer import to_device

_MOST_LEFT = 0.9
"""Nodes as a share of the row's tokens, above which laying out branches costs more than it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forest:
    """A row's nodes, and where they stand in its branches."""

    tokens_U: torch.Tensor
    """[U] int64: a place of the row where the node's token and position stand."""
    predictors_S: torch.Tensor
    """[S] int64: the node that predicts each sampled token."""
    lengths: tuple[int, ...]
    """Of the branches, decreasing."""
    branches_E: torch.Tensor
    """[E] int64: the nodes of each branch, from its root."""
    places_U: torch.Tensor
    """[U] int64: where in the branches each node stands first."""


def find_forest(
    lengths: Sequence[int],
    token_ids_T: NDArray[np.int64],
    predictors_S: NDArray[np.int64],
    device: torch.device,
) -> Forest | None:
    """The forest of a row's sequences; None if it has nearly as many nodes as the row has tokens."""
    node_T = np.arange(len(token_ids_T))
    branches: list[NDArray[np.int64]] = []
    before = slice(0, 0)
    # In order of their tokens each shares most with the one before. Big-endian bytes sort as ids do.
    sortable_T = token_ids_T.astype(">i8")
    for here in sorted(_needed(lengths, predictors_S), key=lambda tokens: sortable_T[tokens].tobytes()):
        common = _num_common(token_ids_T[before], token_ids_T[here])
        node_T[here.start : here.start + common] = node_T[before.start : before.start + common]
        if branches and common == before.stop - before.start:
            branches.pop()
        branches.append(node_T[here])
        before = here
    branches.sort(key=len, reverse=True)
    along_E = np.concatenate(branches) if branches else node_T[:0]
    tokens_U, places_U, branches_E = np.unique(along_E, return_index=True, return_inverse=True)
    if len(tokens_U) > _MOST_LEFT * len(token_ids_T) or not len(tokens_U):
        return None
    predicting_S = np.searchsorted(tokens_U, node_T[predictors_S])
    return Forest(
        tokens_U=to_device(tokens_U, device),
        predictors_S=to_device(predicting_S, device),
        lengths=tuple(len(branch) for branch in branches),
        branches_E=to_device(branches_E, device),
        places_U=to_device(places_U, device),
    )


def _needed(lengths: Sequence[int], predictors_S: NDArray[np.int64]) -> list[slice]:
    """Of each sequence that is learned from, the tokens up to its last predictor."""
    starts = np.cumsum([0, *lengths])
    last = np.searchsorted(predictors_S, starts[1:]) - 1
    ends = np.where(last >= 0, predictors_S[last] + 1, 0) if len(predictors_S) else np.zeros_like(last)
    return [slice(int(start), int(end)) for start, end in zip(starts[:-1], ends, strict=True) if end > start]


def _num_common(left: NDArray[np.int64], right: NDArray[np.int64]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(left), len(right))
    differ = left[:shorter] != right[:shorter]
    return int(differ.argmax()) if differ.any() else shorter


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of `states`, some of them several times; gradients are added in an order that is always the same."""
    return states[index] if states.is_cuda else states.index_select(0, index)
