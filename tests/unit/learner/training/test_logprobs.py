import math

import pytest
import torch

from learner.training import logprob_kernels
from learner.training.fused_logprobs import fused_token_logprobs
from learner.training.logprobs import score_logits, token_logprobs


def test_two_equal_logits_are_a_coin() -> None:
    logprobs, entropy = score_logits(torch.zeros(1, 2), torch.tensor([1]), temperature=1.0)
    assert logprobs.item() == pytest.approx(math.log(0.5))
    assert entropy.item() == pytest.approx(math.log(2))


def test_temperature_divides_the_logits() -> None:
    logprobs, _ = score_logits(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), temperature=2.0)
    assert logprobs.item() == pytest.approx(1 - math.log(1 + math.e))


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    logprobs, entropy = score_logits(logits, torch.arange(5), temperature=1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, logits.double().log_softmax(-1)[range(5), range(5)].float())


def test_tokens_that_are_ruled_out_leave_the_rest_finite() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]] * 2, requires_grad=True)
    logprobs, entropy = score_logits(logits, torch.tensor([0, 1]), temperature=1.0)
    assert logprobs.tolist() == [pytest.approx(math.log(0.5)), -math.inf]
    assert entropy.tolist() == [pytest.approx(math.log(2))] * 2
    logprobs[0].backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_chunks_change_neither_values_nor_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 8, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 50, (23,), generator=generator)
    results = []
    for chunk_elements in (1 << 20, 7 * 50, 1):
        leaf = hidden.clone().requires_grad_()
        logprobs, entropy = token_logprobs(
            leaf, weight, targets, temperature=0.7, chunk_elements=chunk_elements
        )
        gradients = torch.autograd.grad((logprobs * torch.arange(23)).sum(), (leaf, weight))
        results.append((logprobs, entropy, *gradients))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def score_by_torch(logits, targets, temperature, logprobs, entropy, log_sums):  # type: ignore[no-untyped-def]
    """What the Triton kernel does, in tensor operations."""
    found = score_logits(logits, targets, temperature=temperature)
    for out, values in zip((logprobs, entropy), found, strict=True):
        out.copy_(values)
    log_sums.copy_((logits.float() / temperature).logsumexp(-1))


def to_gradient_by_torch(logits, targets, temperature, log_sums, scaled):  # type: ignore[no-untyped-def]
    probabilities = (logits.float() / temperature - log_sums[:, None]).exp()
    hits = torch.nn.functional.one_hot(targets, logits.shape[1])
    logits.copy_((hits - probabilities) * scaled[:, None])


@pytest.fixture
def kernels_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob_kernels, "score", score_by_torch)
    monkeypatch.setattr(logprob_kernels, "to_gradient", to_gradient_by_torch)


@pytest.mark.usefixtures("kernels_of_torch")
@pytest.mark.parametrize("chunk", [None, 23, 7, 1])
def test_fused_log_probabilities_are_the_plain_ones(chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(size, 8, generator=generator).requires_grad_() for size in (23, 50)]
    targets = torch.randint(0, 50, (23,), generator=generator)
    results = []
    for found in (
        fused_token_logprobs(*leaves, targets, temperature=0.7, chunk=chunk),
        token_logprobs(*leaves, targets, temperature=0.7),
    ):
        gradients = torch.autograd.grad((found[0] * torch.arange(23)).sum(), leaves, retain_graph=True)
        results.append((*found, *gradients))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels_of_torch")
def test_fused_log_probabilities_refuse_a_second_backward_pass() -> None:
    hidden = torch.ones(3, 4, requires_grad=True)
    logprobs, _ = fused_token_logprobs(hidden, torch.eye(5, 4), torch.arange(3), temperature=1.0)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten"):
        logprobs.sum().backward()


@pytest.mark.usefixtures("kernels_of_torch")
def test_fused_log_probabilities_of_no_tokens_have_a_gradient_of_0() -> None:
    weight = torch.eye(5, 4).requires_grad_()
    hidden, targets = torch.ones(0, 4), torch.zeros(0, dtype=torch.int64)
    logprobs, entropy = fused_token_logprobs(hidden, weight, targets, temperature=1.0)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
