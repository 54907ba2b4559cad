"""Packed rows: many sequences end to end in one row, without padding.

T   tokens of one packed row
S   the row's sampled tokens: those whose log-probability the loss needs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from learner.training.prefixes import Forest, find_forest
from learner.training.transfer import to_device
from penstock.trajectory import TokenIds

_WORTH_SHARING = 0.1
"""Of the tokens of one prompt's sequences, what the prompt's repetitions must be for them to share a row."""

ScalarT = TypeVar("ScalarT", bound=np.generic)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One trajectory, or one prompt with its completion."""

    token_ids: TokenIds
    """[T] int32."""
    loss_mask: NDArray[np.uint8]
    """[T] uint8: 1 where the token is learned from. The first token is predicted by nothing, and never counts."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def prompt(self) -> TokenIds:
        """The tokens before the first that is learned from."""
        learned = self.loss_mask[1:].astype(bool)
        return self.token_ids[: 1 + int(learned.argmax())] if learned.any() else self.token_ids

    @property
    def num_sampled(self) -> int:
        return int(self.loss_mask[1:].sum())

    def sampled(self, values: NDArray[ScalarT]) -> NDArray[ScalarT]:
        """Takes the sampled tokens' entries of an array over all tokens: [T] to [S]."""
        taken: NDArray[ScalarT] = values[1:][self.loss_mask[1:].astype(bool)]
        return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """One row as tensors. Its sequences stand longest first, which lets attention group them by length."""

    members: tuple[int, ...]
    """Which sequences of the batch, in the row's order. Empty for a row that only keeps ranks in step."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, decreasing."""
    token_ids_T: torch.Tensor
    """[T] int64."""
    positions_T: torch.Tensor
    """[T] int64, from 0 in each sequence."""
    predictors_S: torch.Tensor
    """[S] int64: where in the row the prediction of each sampled token is read off."""
    targets_S: torch.Tensor
    """[S] int64: the sampled tokens."""
    forest: Forest | None = None
    """What its sequences have in common, where that is worth computing once."""
    hidden_1TH: torch.Tensor | None = None
    """What other ranks' blocks made of it, where the policy's first blocks are not on this rank."""

    @property
    def device(self) -> torch.device:
        return self.token_ids_T.device

    def gather(self, values: Sequence[NDArray[Any]]) -> torch.Tensor:
        """Joins one [S] array a sequence, given for the whole batch, into the row's [S]."""
        parts = [values[member] for member in self.members]
        return to_device(np.concatenate(parts) if parts else np.zeros(0, np.float32), self.device)


def padded(row: PackedRow, multiple: int) -> PackedRow:
    """The row with a sequence of one token for each that it is short of a multiple. Nothing is predicted there."""
    missing = -row.token_ids_T.numel() % multiple
    if not missing:
        return row
    token_ids_T, positions_T = (
        torch.nn.functional.pad(part, (0, missing)) for part in (row.token_ids_T, row.positions_T)
    )
    return dataclasses.replace(
        row, lengths=(*row.lengths, *[1] * missing), token_ids_T=token_ids_T, positions_T=positions_T
    )


def siblings(sequences: Sequence[TokenSequence], *, most_tokens: int) -> list[tuple[int, ...]]:
    """Parts of a batch that are to share a row: sequences of one prompt, where that is much of them.

    most_tokens: of a part of several, so that rows can still be filled and balanced with parts.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_prompt.setdefault(sequence.prompt.tobytes(), []).append(index)
    parts: list[tuple[int, ...]] = []
    for members in by_prompt.values():
        common = len(sequences[members[0]].prompt) * (len(members) - 1)
        if common < _WORTH_SHARING * sum(sequences[member].num_tokens for member in members):
            parts += [(member,) for member in members]
        else:
            parts += _cut(members, [sequences[member].num_tokens for member in members], most_tokens)
    return sorted(parts)


def _cut(members: Sequence[int], lengths: Sequence[int], most_tokens: int) -> list[tuple[int, ...]]:
    """Consecutive members, as many to a part as fit, and at least one."""
    parts: list[list[int]] = []
    room = 0
    for member, length in zip(members, lengths, strict=True):
        if not parts or length > room:
            parts.append([])
            room = most_tokens
        parts[-1].append(member)
        room -= length
    return [tuple(part) for part in parts]


def plan_rows(
    lengths: Sequence[int],
    *,
    row_tokens: int,
    num_ranks: int,
    hidden_size: int,
    parts: Sequence[tuple[int, ...]] | None = None,
) -> list[list[tuple[int, ...]]]:
    """Distributes sequences over ranks and rows: result[rank][i] is a rank's i-th row, of indices into `lengths`.

    A row holds at most `row_tokens` tokens, or one sequence that is longer. Every rank has
    the same number of rows, since each row takes part in collectives; a row may be empty
    when there are fewer sequences than ranks. Rows that are evaluated together cost about
    the same. Deterministic. parts: sequences that stay together; by default each stands alone.
    """
    parts = [(index,) for index in range(len(lengths))] if parts is None else parts
    tokens = [sum(lengths[index] for index in part) for part in parts]
    costs = [sum(_cost(lengths[index], hidden_size) for index in part) for part in parts]
    order = sorted(range(len(parts)), key=lambda index: (-tokens[index], index))
    packed = _first_fit(order, tokens, row_tokens)
    num_rows = -(-len(packed) // num_ranks) * num_ranks
    rows = _balanced(order, tokens, costs, row_tokens, num_rows)
    if rows is None:
        rows = packed + [[] for _ in range(num_rows - len(packed))]
    rows.sort(key=lambda row: -sum(costs[index] for index in row))
    planned = [tuple(member for index in row for member in parts[index]) for row in rows]
    return [planned[rank::num_ranks] for rank in range(num_ranks)]


def join_rows(rows: Sequence[tuple[int, ...]], *, rows_per_pass: int) -> list[tuple[int, ...]]:
    """Rows that go through the model together, end to end: at most so many, in as few passes as that allows.

    Passes get about the same share of the rows, which stand in the order of their cost.
    """
    num_passes = -(-len(rows) // rows_per_pass)
    return [tuple(member for row in rows[first::num_passes] for member in row) for first in range(num_passes)]


def _cost(length: int, hidden_size: int) -> int:
    """Attention grows with length squared, all else with length; they are equal at 6 hidden sizes."""
    return length * (length + 6 * hidden_size)


def _first_fit(order: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """First-fit decreasing: each sequence into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fit = next((row for row, left in enumerate(room) if lengths[index] <= left), None)
        if fit is None:
            rows.append([index])
            room.append(row_tokens - lengths[index])
        else:
            rows[fit].append(index)
            room[fit] -= lengths[index]
    return rows


def _balanced(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[int], row_tokens: int, num_rows: int
) -> list[list[int]] | None:
    """Each sequence into the cheapest row that has room; None where that needs more rows than there are."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    tokens, cost = [0] * num_rows, [0] * num_rows
    for index in order:
        open_rows = [
            row for row in range(num_rows) if not rows[row] or tokens[row] + lengths[index] <= row_tokens
        ]
        if not open_rows:
            return None
        row = min(open_rows, key=lambda candidate: (cost[candidate], candidate))
        rows[row].append(index)
        tokens[row] += lengths[index]
        cost[row] += costs[index]
    return rows


def pack(sequences: Sequence[TokenSequence], members: Sequence[int], device: torch.device) -> PackedRow:
    """Lays sequences end to end. Without members, a stand-in of two tokens that no loss reads."""
    ordered = sorted(members, key=lambda index: (-sequences[index].num_tokens, index))
    chosen = [sequences[index] for index in ordered] or [_stand_in(sequences[0])]
    lengths = [sequence.num_tokens for sequence in chosen]
    token_ids_T = np.concatenate([sequence.token_ids for sequence in chosen]).astype(np.int64)
    mask_T = np.concatenate([_without_first(sequence.loss_mask) for sequence in chosen])
    sampled_S = np.flatnonzero(mask_T)
    positions_T = np.concatenate([np.arange(length) for length in lengths])
    return PackedRow(
        members=tuple(ordered),
        lengths=tuple(lengths),
        token_ids_T=to_device(token_ids_T, device),
        positions_T=to_device(positions_T, device),
        predictors_S=to_device(sampled_S - 1, device),
        targets_S=to_device(token_ids_T[sampled_S], device),
        forest=find_forest(lengths, token_ids_T, sampled_S - 1, device),
    )


def nodes_of(row: PackedRow) -> PackedRow:
    """The row as its forest: a token for each node. Its lengths are those of the branches."""
    forest = row.forest
    if forest is None:
        return row
    return dataclasses.replace(
        row,
        lengths=forest.lengths,
        token_ids_T=row.token_ids_T[forest.tokens_U],
        positions_T=row.positions_T[forest.tokens_U],
        predictors_S=forest.predictors_S,
    )


def _without_first(mask_T: NDArray[np.uint8]) -> NDArray[np.uint8]:
    mask_T = mask_T.copy()
    mask_T[:1] = 0
    return mask_T


def _stand_in(sequence: TokenSequence) -> TokenSequence:
    return TokenSequence(token_ids=sequence.token_ids[:2], loss_mask=np.zeros_like(sequence.loss_mask[:2]))
