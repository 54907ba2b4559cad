"""Log-probabilities where each rank has a part of the vocabulary: the same as logprobs.py's, of all of it.

Ranks exchange four numbers a token, and never a logit.

S   sampled tokens        v   this rank's part of the vocabulary        H   hidden size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from learner.training.logprobs import CHUNK_ELEMENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A rank's rows of the matrix that gives the logits."""

    weight_vH: torch.Tensor
    start: int
    """The token of its first row."""
    group: dist.ProcessGroup
    """Who has the other rows."""


def shared_token_logprobs(
    hidden_SH: torch.Tensor,
    part: Part,
    targets_S: torch.Tensor,
    *,
    temperature: float,
    chunk_elements: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprobs_S, entropy_S) as token_logprobs gives them, on every rank of the group.

    Each rank has the same hidden_SH; the gradient that it gets is this part's summand of it.
    """
    bound = chunk_elements or CHUNK_ELEMENTS[hidden_SH.device.type]
    chunk = max(1, bound // max(1, part.weight_vH.shape[0]))
    scores: tuple[torch.Tensor, torch.Tensor] = _SharedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_SH, part.weight_vH, targets_S - part.start, temperature, chunk, part.group
    )
    return scores


class _SharedLogprobs(torch.autograd.Function):
    """d logprob / d logits = (onehot(target) - softmax) / temperature; targets count from the part's first token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_vH: torch.Tensor,
        targets_S: torch.Tensor,
        temperature: float,
        chunk: int,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            _part_sums(_logits(hidden, weight_vH, temperature), targets)
            for hidden, targets in zip(
                torch.split(hidden_SH, chunk), torch.split(targets_S, chunk), strict=True
            )
        ]
        largest_S, *sums = (torch.cat(each) for each in zip(*parts, strict=True))
        logprobs_S, entropy_S, log_total_S = _joined(largest_S, torch.stack(sums), group)
        ctx.save_for_backward(hidden_SH, weight_vH, targets_S, log_total_S)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy_S)
        return logprobs_S, entropy_S

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_SH, weight_vH, targets_S, log_total_S = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(weight_vH.dtype, torch.float32)
        weight_grad = torch.zeros_like(weight_vH, dtype=wide) if needs_weight else None
        parts_SH = []
        whole_S = (hidden_SH, targets_S, log_total_S, gradients[0] / ctx.temperature)
        for hidden, targets, log_total, gradient in zip(
            *(torch.split(each, ctx.chunk) for each in whole_S), strict=True
        ):
            logits = _logits(hidden, weight_vH, ctx.temperature)
            to_logits = logits.sub_(log_total[:, None]).exp_().mul_(-gradient[:, None])
            index, inside = _own(targets, to_logits.shape[1])
            to_logits.scatter_add_(1, index, torch.where(inside, gradient, 0.0)[:, None])
            to_logits = to_logits.to(hidden.dtype)
            if needs_hidden:
                parts_SH.append(to_logits @ weight_vH)
            if weight_grad is not None:
                weight_grad += to_logits.T @ hidden
        hidden_grad = torch.cat(parts_SH) if needs_hidden else None
        weight_grad = None if weight_grad is None else weight_grad.to(weight_vH.dtype)
        return hidden_grad, weight_grad, None, None, None, None


def _logits(hidden_SH: torch.Tensor, weight_vH: torch.Tensor, temperature: float) -> torch.Tensor:
    return (hidden_SH @ weight_vH.T).float() / temperature


def _part_sums(logits_Sv: torch.Tensor, targets_S: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of each token: the largest logit m here, sum e^(l - m), sum e^(l - m) (l - m), and the target's logit or 0."""
    largest_S = logits_Sv.amax(-1)
    index, inside = _own(targets_S, logits_Sv.shape[1])
    target_S = torch.where(inside, logits_Sv.gather(1, index)[:, 0], 0.0)
    shifted_Sv = logits_Sv - largest_S[:, None]
    weights_Sv = shifted_Sv.exp()
    return largest_S, weights_Sv.sum(-1), torch.linalg.vecdot(weights_Sv, shifted_Sv), target_S


def _joined(
    largest_S: torch.Tensor, sums: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probability, entropy, log of the sum of all e^l) from every rank's part sums, [S] each."""
    top_S = largest_S.clone()
    dist.all_reduce(top_S, dist.ReduceOp.MAX, group=group)
    total_S, weighted_S, target_S = sums
    shift_S = largest_S - top_S
    scale_S = shift_S.exp()
    shared = torch.stack([total_S * scale_S, (weighted_S + shift_S * total_S) * scale_S, target_S])
    dist.all_reduce(shared, group=group)
    total_S, weighted_S, target_S = shared
    log_total_S = top_S + total_S.log()
    return target_S - log_total_S, total_S.log() - weighted_S / total_S, log_total_S


def _own(targets_S: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([S, 1] an index into the part, [S] whether it is the target's)."""
    inside = (targets_S >= 0) & (targets_S < rows)
    return targets_S.clamp(0, rows - 1)[:, None], inside
