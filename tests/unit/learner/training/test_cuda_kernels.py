"""Kernels that only a GPU runs: variable-length attention, and log-probabilities from logits.

Imports little, so that it also runs where only torch and pytest are installed.
"""

from __future__ import annotations

import pytest
import torch

from learner.training import attention
from learner.training.attention import RowLayout, packed_attention
from learner.training.fused_logprobs import fused_token_logprobs, is_available
from learner.training.logprobs import score_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTHS = [130, 64, 64, 63, 7, 1]


@pytest.mark.parametrize("window", [None, 16])
def test_the_varlen_kernel_agrees_with_the_bucketed_path(window: int | None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    total = sum(LENGTHS)
    shapes = [(1, 8, total, 64), (1, 2, total, 64), (1, 2, total, 64)]
    exact = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    half = [part.bfloat16().requires_grad_() for part in exact]
    exact = [part.detach().float().requires_grad_() for part in half]
    layout = RowLayout(LENGTHS, torch.device("cuda"))
    arguments = {"sliding_window": window, "row_layout": layout}
    fast, _ = packed_attention(torch.nn.Identity(), *half, None, **arguments)
    slow, _ = packed_attention(torch.nn.Identity(), *exact, None, **arguments)
    torch.testing.assert_close(fast.float(), slow, rtol=2e-2, atol=2e-2)
    weights = torch.randn(slow.shape, device="cuda", generator=generator)
    for got, expected in zip(
        torch.autograd.grad((fast.float() * weights).sum(), half),
        torch.autograd.grad((slow * weights).sum(), exact),
        strict=True,
    ):
        torch.testing.assert_close(got.float(), expected, rtol=5e-2, atol=5e-2)


def test_keys_are_not_repeated_for_grouped_queries() -> None:
    assert attention._takes_groups(torch.device("cuda", 0))


def test_the_kernels_of_log_probabilities_are_available() -> None:
    assert is_available(torch.device("cuda", 0))


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_log_probabilities_are_those_of_log_softmax(dtype: torch.dtype, chunk: int | None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_()
        for shape in ((40, 64), (9001, 64))
    )
    targets = torch.randint(0, 9001, (40,), device="cuda", generator=generator)
    slopes = torch.randn(40, device="cuda", generator=generator)
    fused = fused_token_logprobs(hidden, weight, targets, temperature=0.7, chunk=chunk)
    plain = score_logits(hidden @ weight.T, targets, temperature=0.7)
    for got, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    leaves = (hidden, weight)
    got_gradients = torch.autograd.grad((fused[0] * slopes).sum(), leaves)
    for got, expected in zip(
        got_gradients, torch.autograd.grad((plain[0] * slopes).sum(), leaves), strict=True
    ):
        assert got.dtype == dtype
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        assert float((got - expected).norm()) <= tolerance * float(expected.norm())
