"""Log-probabilities of given tokens, in float32, without the whole [S, V] matrix.

S   sampled tokens        V   vocabulary        H   hidden size
"""

from __future__ import annotations

from typing import Any

import torch

from learner.training.fused_logprobs import fused_token_logprobs, is_available

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Bound on S * V of one chunk, by device: 64 MiB and 1 GiB of float32. A GPU needs long matrices."""


def token_logprobs(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_S: torch.Tensor,
    *,
    temperature: float,
    chunk_elements: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden weight^T / temperature) at the targets, and the distribution's entropy, in nats.

    hidden_SH: [S, H], weight_VH: [V, H], of one float dtype. Returns (logprobs_S, entropy_S),
    both [S] float32; the entropy carries no gradient. Tokens are taken in chunks; of one
    chunk the probabilities are kept for the backward pass, of more they are computed again.
    """
    bound = chunk_elements or CHUNK_ELEMENTS[hidden_SH.device.type]
    chunk = max(1, bound // weight_VH.shape[0])
    if hidden_SH.is_cuda and is_available(hidden_SH.device):
        return fused_token_logprobs(hidden_SH, weight_VH, targets_S, temperature=temperature)
    scores: tuple[torch.Tensor, torch.Tensor] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_SH, weight_VH, targets_S, temperature, chunk
    )
    return scores


class _TokenLogprobs(torch.autograd.Function):
    """d logprob / d logits = (onehot(target) - softmax) / temperature, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_S: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = []
        probabilities_SV = None
        for hidden, targets in zip(torch.split(hidden_SH, chunk), torch.split(targets_S, chunk), strict=True):
            logprobs, entropy, probabilities_SV = _score(hidden @ weight_VH.T, targets, temperature)
            scores.append((logprobs, entropy))
        kept = probabilities_SV if len(scores) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden_SH, weight_VH, targets_S, kept)
        ctx.temperature, ctx.chunk = temperature, chunk
        logprobs_S, entropy_S = (torch.cat(parts) for parts in zip(*scores, strict=True))
        ctx.mark_non_differentiable(entropy_S)
        return logprobs_S, entropy_S

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_SH, weight_VH, targets_S, kept_SV = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        parts_SH = []
        # Chunks are added up in float32, whatever the weight's dtype.
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        weight_grad = torch.zeros_like(weight_VH, dtype=wide) if needs_weight else None
        scaled_S = gradients[0] / ctx.temperature
        for hidden, targets, gradient in zip(
            *(torch.split(part, ctx.chunk) for part in (hidden_SH, targets_S, scaled_S)), strict=True
        ):
            probabilities = (
                kept_SV if kept_SV is not None else _log_softmax(hidden @ weight_VH.T, ctx.temperature).exp_()
            )
            to_logits = probabilities * -gradient[:, None]
            to_logits.scatter_add_(1, targets[:, None], gradient[:, None])
            to_logits = to_logits.to(hidden.dtype)
            if needs_hidden:
                parts_SH.append(to_logits @ weight_VH)
            if weight_grad is not None:
                _add_product(weight_grad, to_logits.T, hidden)
        hidden_grad = torch.cat(parts_SH) if needs_hidden else None
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight_VH.dtype), None, None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def score_logits(
    logits_SV: torch.Tensor, targets_S: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from whole logits, for models whose logits are more than a matrix product.

    logits_SV: [S, V], any float dtype; -inf rules a token out. Returns two [S] float32.
    """
    all_SV = _log_softmax(logits_SV, temperature)
    logprobs_S = all_SV.gather(1, targets_S[:, None])[:, 0]
    with torch.no_grad():
        entropy_S = _entropy(all_SV, all_SV.exp())
    return logprobs_S, entropy_S


def _score(
    logits_SV: torch.Tensor, targets_S: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probabilities [S], entropies [S], probabilities [S, V]), float32, without gradients."""
    all_SV = _log_softmax(logits_SV, temperature)
    logprobs_S = all_SV.gather(1, targets_S[:, None])[:, 0]
    probabilities_SV = all_SV.exp()
    return logprobs_S, _entropy(all_SV, probabilities_SV), probabilities_SV


def _log_softmax(logits_SV: torch.Tensor, temperature: float) -> torch.Tensor:
    scaled_SV = logits_SV.float()
    if temperature != 1.0:
        scaled_SV = scaled_SV / temperature
    return scaled_SV.log_softmax(-1)


def _entropy(all_SV: torch.Tensor, probabilities_SV: torch.Tensor) -> torch.Tensor:
    """-sum p log p, where 0 log 0 is 0."""
    finite_SV = all_SV.clamp(min=torch.finfo(all_SV.dtype).min)
    entropy_S: torch.Tensor = -torch.linalg.vecdot(probabilities_SV, finite_SV)
    return entropy_S
