"""`logprobs.py` on a GPU: what becomes of logits is one kernel each way, which reads them once.

In eager tensor operations logits are read and written about ten times in float32, which takes longer
than the matrix product that makes them. Here they stay in the dtype of that product, all
arithmetic on them is float32 in registers, and their gradient takes their place.

S   sampled tokens        V   vocabulary        H   hidden size
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from learner.training import logprob_kernels

_log = logging.getLogger(__name__)

CHUNK_SHARE = 20
"""The logits of one chunk take at most so small a part of the GPU's memory: 4 GiB of 80. Those of a single chunk are
kept for the backward pass."""


def fused_token_logprobs(
    hidden_SH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_S: torch.Tensor,
    *,
    temperature: float,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_logprobs`: (logprobs_S, entropy_S), of which the entropy carries no gradient.

    chunk: tokens of one; unset, as many as the bound allows. Its backward pass can run once only.
    """
    chunk = chunk or max(1, _chunk_bytes(hidden_SH.device) // (len(weight_VH) * hidden_SH.element_size()))
    scores: tuple[torch.Tensor, torch.Tensor] = _FusedTokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_SH, weight_VH, targets_S, temperature, chunk
    )
    return scores


@cache
def _chunk_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 26
    total: int = torch.cuda.get_device_properties(device).total_memory
    return total // CHUNK_SHARE


class _FusedTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_S: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(targets_S)
        logprobs_S, entropy_S, log_sums_S = (
            torch.empty(count, dtype=torch.float32, device=hidden_SH.device) for _ in range(3)
        )
        logits_SV = None
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            logits_SV = hidden_SH[part] @ weight_VH.T
            logprob_kernels.score(
                logits_SV,
                targets_S[part],
                temperature,
                logprobs_S[part],
                entropy_S[part],
                log_sums_S[part],
            )
        ctx.kept = logits_SV if count <= chunk and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden_SH, weight_VH, targets_S, log_sums_S)
        ctx.temperature, ctx.chunk, ctx.is_spent = temperature, chunk, False
        ctx.mark_non_differentiable(entropy_S)
        return logprobs_S, entropy_S

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError("the log-probabilities' backward pass ran before: its logits are overwritten")
        ctx.is_spent = True
        hidden_SH, weight_VH, targets_S, log_sums_S = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        to_hidden_SH = torch.empty_like(hidden_SH) if needs_hidden else None
        to_weight_VH = None
        scaled_S = (gradients[0] / ctx.temperature).contiguous()
        for start in range(0, len(targets_S), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits_SV = hidden_SH[part] @ weight_VH.T if ctx.kept is None else ctx.kept
            logprob_kernels.to_gradient(
                logits_SV, targets_S[part], ctx.temperature, log_sums_S[part], scaled_S[part]
            )
            if to_hidden_SH is not None:
                torch.mm(logits_SV, weight_VH, out=to_hidden_SH[part])
            if needs_weight:
                product = logits_SV.T @ hidden_SH[part]
                to_weight_VH = _added(to_weight_VH, product, is_last=len(targets_S) <= ctx.chunk)
        ctx.kept = None
        if needs_weight and to_weight_VH is None:
            to_weight_VH = torch.zeros_like(weight_VH)
        return (
            to_hidden_SH,
            None if to_weight_VH is None else to_weight_VH.to(weight_VH.dtype),
            None,
            None,
            None,
        )


def _added(total: torch.Tensor | None, product: torch.Tensor, *, is_last: bool) -> torch.Tensor:
    """Of several chunks the sum is float32."""
    if total is None:
        return product if is_last else product.float()
    return total.add_(product)


@cache
def is_available(device: torch.device) -> bool:
    """Whether the kernels can be compiled here, and say what they should. Logs why not."""
    try:
        return _agrees(device)
    except Exception as error:  # noqa: BLE001
        _log.warning("log-probabilities are computed without fused kernels, which is slower: %s", error)
        return False


def _agrees(device: torch.device) -> bool:
    if not logprob_kernels.HAS_TRITON:
        raise RuntimeError("triton is not installed")
    logits_SV = torch.linspace(-4.0, 4.0, 3 * 7, device=device).view(3, 7)
    targets_S = torch.tensor([0, 6, 3], device=device)
    logprobs_S, entropy_S, log_sums_S = torch.empty(3, 3, device=device).unbind()
    logprob_kernels.score(logits_SV, targets_S, 2.0, logprobs_S, entropy_S, log_sums_S)
    all_SV = (logits_SV / 2.0).log_softmax(-1)
    expected_S = all_SV.gather(1, targets_S[:, None])[:, 0]
    entropies_S = -(all_SV.exp() * all_SV).sum(-1)
    close = torch.allclose(logprobs_S, expected_S, atol=1e-5)
    if not (close and torch.allclose(entropy_S, entropies_S, atol=1e-5)):
        raise RuntimeError("they disagree with torch's log_softmax")
    return True
