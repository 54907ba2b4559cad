"""Triton kernels over rows of logits; a program takes a row, or a part of one.

S   rows        V   logits of a row
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

_BLOCK = 4096
"""Logits that a program holds in registers at a time."""
_WARPS = 8


def score(
    logits_SV: torch.Tensor,
    targets_S: torch.Tensor,
    temperature: float,
    logprobs_S: torch.Tensor,
    entropy_S: torch.Tensor,
    log_sums_S: torch.Tensor,
) -> None:
    """Writes log softmax(logits / temperature) at the targets, its entropy, and log sum exp(logits / temperature).

    logits_SV: contiguous, any float dtype; -inf rules a token out. The three outputs are float32.
    """
    rows, width = logits_SV.shape
    if rows:
        _score[(rows,)](
            logits_SV, targets_S, logprobs_S, entropy_S, log_sums_S, 1.0 / temperature, width,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


def to_gradient(
    logits_SV: torch.Tensor,
    targets_S: torch.Tensor,
    temperature: float,
    log_sums_S: torch.Tensor,
    scaled_S: torch.Tensor,
) -> None:
    """Overwrites logits with scaled (onehot(target) - softmax(logits / temperature)), the gradient of the loss.

    scaled_S: [S] float32, the gradient by the log-probability, divided by the temperature.
    """
    rows, width = logits_SV.shape
    if rows:
        _to_gradient[(rows, triton.cdiv(width, _BLOCK))](
            logits_SV, targets_S, log_sums_S, scaled_S, 1.0 / temperature, width,
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


if HAS_TRITON:
    _LOWEST = tl.constexpr(-3.0e38)

    @triton.jit
    def _score(
        logits,
        targets,
        logprobs,
        entropies,
        log_sums,
        inverse_temperature,
        width,
        BLOCK: tl.constexpr,
    ):
        """One pass: the largest logit so far, and sums of e^(x - largest) and of e^(x - largest) (x - largest)."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * width
        columns = tl.arange(0, BLOCK)
        largest = _LOWEST
        total = 0.0
        weighted = 0.0
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            x = x * inverse_temperature
            next_largest = tl.maximum(largest, tl.max(x, axis=0))
            shift = largest - next_largest
            x = x - next_largest
            e = tl.exp(x)
            shrink = tl.exp(shift)
            weighted = shrink * (weighted + total * shift) + tl.sum(tl.where(e > 0.0, e * x, 0.0), axis=0)
            total = shrink * total + tl.sum(e, axis=0)
            largest = next_largest
        log_total = tl.log(total)
        target = tl.load(targets + row)
        chosen = tl.load(logits + target).to(tl.float32) * inverse_temperature
        tl.store(logprobs + row, chosen - largest - log_total)
        tl.store(entropies + row, log_total - weighted / total)
        tl.store(log_sums + row, largest + log_total)

    @triton.jit
    def _to_gradient(
        logits,
        targets,
        log_sums,
        scaled,
        inverse_temperature,
        width,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        places = logits + row * width + columns
        x = tl.load(places, mask=inside, other=float("-inf")).to(tl.float32)
        probability = tl.exp(x * inverse_temperature - tl.load(log_sums + row))
        hit = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
        gradient = (hit - probability) * tl.load(scaled + row)
        tl.store(places, gradient.to(logits.dtype.element_ty), mask=inside)
