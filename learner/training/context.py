"""Context parallelism: several ranks hold one row's tokens, a slice each.

Everything but attention works on a token alone, so each rank runs the model on its slice.
Before attention the ranks exchange: each gives away tokens and gets heads, so that it
attends over the whole row with its share of the heads, and exchanges back after it (Jacobs
et al. 2023, "DeepSpeed Ulysses"). That balances causal attention whatever the lengths.

T   tokens of a row, padded to a multiple of the ranks     S   its sampled tokens
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from learner.training.packing import PackedRow


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextGroup:
    """The ranks that hold one row, and this one's place among them."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def slice_of(self, row: PackedRow) -> PackedRow:
        """This rank's tokens and predictors of a row, padded to a multiple of the ranks. Lengths are the row's."""
        share = row.token_ids_T.numel() // self.size
        first, last = self._sampled(row)
        mine = slice(self.rank * share, (self.rank + 1) * share)
        return dataclasses.replace(
            row,
            token_ids_T=row.token_ids_T[mine],
            positions_T=row.positions_T[mine],
            predictors_S=row.predictors_S[first:last] - mine.start,
            targets_S=row.targets_S[first:last],
        )

    def join(self, values: torch.Tensor, row: PackedRow) -> torch.Tensor:
        """Every rank's part of an [S], in the row's order, on every rank. Gradients go to this rank's part only."""
        first, _ = self._sampled(row)
        joined: torch.Tensor = _Join.apply(  # type: ignore[no-untyped-call]
            values, first, row.targets_S.numel(), self.group
        )
        return joined

    def tokens_for_heads(self, states: torch.Tensor) -> torch.Tensor:
        """[T / ranks, heads, D] of this rank's tokens to [T, heads / ranks, D] of its heads."""
        heads = states.shape[1]
        if heads % self.size:
            raise ValueError(f"{heads} heads cannot be shared by {self.size} ranks of context parallelism")
        return _exchange(states, self, split=1, join=0)

    def heads_for_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return _exchange(states, self, split=0, join=1)

    def _sampled(self, row: PackedRow) -> tuple[int, int]:
        """Which of the row's sampled tokens are predicted in this rank's slice: predictors stand in order."""
        share = row.token_ids_T.numel() // self.size
        bounds = torch.tensor([self.rank * share, (self.rank + 1) * share], device=row.device)
        first, last = torch.searchsorted(row.predictors_S, bounds).tolist()
        return first, last


def _exchange(states: torch.Tensor, context: ContextGroup, *, split: int, join: int) -> torch.Tensor:
    exchanged: torch.Tensor = _Exchange.apply(states, context, split, join)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """Gives each rank one part along `split`, and joins what comes along `join`."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, context: ContextGroup, split: int, join: int) -> torch.Tensor:
        ctx.context, ctx.split, ctx.join = context, split, join
        given = torch.stack(states.chunk(context.size, split))
        taken = torch.empty_like(given)
        dist.all_to_all_single(taken, given, group=context.group)
        return torch.cat(taken.unbind(0), join)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchange(gradients[0], ctx.context, split=ctx.join, join=ctx.split), None, None, None


class _Join(torch.autograd.Function):
    """All ranks compute the same loss of the joined values, so each one's gradient is that of its own part."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, first: int, total: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.part = slice(first, first + values.numel())
        joined = values.new_zeros(total)
        joined[ctx.part] = values
        dist.all_reduce(joined, group=group)
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0][ctx.part], None, None, None
