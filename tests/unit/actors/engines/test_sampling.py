"""The sampler: distributions, filters, and random numbers that depend on seed and place alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engines.sampling import SamplingBatch, sample, uniforms


def numbers(num: int, seed: int = 0) -> torch.Tensor:
    seeds = np.full(num, seed, dtype=np.uint64)
    return torch.from_numpy(uniforms(seeds, np.arange(num)))[:, None]


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_a_token_is_drawn_with_its_log_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    tokens, logprobs = sample(logits, SamplingBatch(uniforms_B1=column(0.5)))
    assert tokens.tolist() == [2]
    assert logprobs.item() == pytest.approx(2.0 - np.log(1 + np.e + np.e**2))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    num = 200_000
    logits = torch.tensor([0.0, -1.0, 2.0, 0.5, -torch.inf])
    tokens, _ = sample(logits.expand(num, -1), SamplingBatch(uniforms_B1=numbers(num)))
    shares = np.bincount(tokens.numpy(), minlength=5) / num
    expected = logits.softmax(-1).numpy()
    deviation = np.sqrt(expected * (1 - expected) / num)
    assert (np.abs(shares - expected) <= 5 * deviation).all()


def test_settings_hold_row_by_row() -> None:
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    temperature = column(1.0, 0.5, 2.0, 1.0, 1.0, 0.7)
    top_k = torch.tensor([20, 20, 3, 1, 20, 5])[:, None]
    top_p = column(1.0, 1.0, 1.0, 1.0, 0.4, 0.9)
    uniform = numbers(6, seed=3)
    together = sample(
        logits,
        SamplingBatch(uniforms_B1=uniform, temperature_B1=temperature, top_k_B1=top_k, top_p_B1=top_p),
    )
    for row in range(6):
        alone = sample(
            logits[row : row + 1],
            SamplingBatch(
                uniforms_B1=uniform[row : row + 1],
                temperature_B1=temperature[row : row + 1],
                top_k_B1=top_k[row : row + 1],
                top_p_B1=top_p[row : row + 1],
            ),
        )
        assert together[0][row] == alone[0][0]
        assert together[1][row] == pytest.approx(alone[1][0].item(), abs=1e-6)


def test_top_k_keeps_the_likeliest_and_renormalises() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).expand(1000, -1)
    tokens, logprobs = sample(
        logits,
        SamplingBatch(uniforms_B1=numbers(1000), top_k_B1=torch.full((1000, 1), 2)),
    )
    assert set(tokens.tolist()) == {1, 2}
    expected = torch.where(tokens == 1, 4 / 7, 3 / 7).log()
    torch.testing.assert_close(logprobs, expected)


def test_top_p_keeps_the_smallest_set_with_enough_mass() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).expand(1000, -1)
    for top_p, kept in ((0.39, {1}), (0.41, {1, 2}), (0.69, {1, 2}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        tokens, _ = sample(
            logits, SamplingBatch(uniforms_B1=numbers(1000), top_p_B1=torch.full((1000, 1), top_p))
        )
        assert set(tokens.tolist()) == kept


def test_greedy_rows_take_the_likeliest_with_its_plain_log_probability() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    tokens, logprobs = sample(
        logits,
        SamplingBatch(
            uniforms_B1=column(0.0001, 0.0001),
            temperature_B1=column(1.0, 1.0),
            top_k_B1=torch.tensor([[3], [3]]),
            greedy_B1=torch.tensor([[True], [False]]),
        ),
    )
    assert tokens.tolist() == [1, 1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 1])


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, logprobs = sample(logits, SamplingBatch(uniforms_B1=numbers(4)))
    expected = logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    scale=st.floats(0.01, 40.0),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-24]),
)
def test_an_impossible_token_is_never_drawn_and_no_logprob_is_positive(
    seed: int, scale: float, uniform: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(8, 64, generator=generator)
    logits[torch.rand(8, 64, generator=generator) < 0.5] = -torch.inf
    logits[:, 17] = 0.0
    tokens, logprobs = sample(logits, SamplingBatch(uniforms_B1=torch.full((8, 1), uniform)))
    assert torch.isfinite(logprobs).all()
    assert (logprobs <= 0).all()
    assert torch.isfinite(logits.gather(-1, tokens[:, None])).all()


def test_uniforms_depend_on_seed_and_counter_alone() -> None:
    seeds = np.array([1, 2, 1, 2**64 - 1], dtype=np.uint64)
    counters = np.array([5, 5, 6, 5])
    together = uniforms(seeds, counters)
    assert len(set(together.tolist())) == 4
    for row in (3, 0, 2, 1):
        assert uniforms(seeds[row : row + 1], counters[row : row + 1]) == together[row]


def test_uniforms_fill_the_unit_interval_evenly_and_neighbours_are_unrelated() -> None:
    num = 100_000
    by_counter = uniforms(np.full(num, 7, dtype=np.uint64), np.arange(num))
    by_seed = uniforms(np.arange(num, dtype=np.uint64), np.full(num, 3))
    for drawn in (by_counter, by_seed):
        assert drawn.dtype == np.float32
        assert drawn.min() >= 0
        assert drawn.max() < 1
        counts = np.bincount((drawn * 20).astype(int), minlength=20)
        assert (np.abs(counts - num / 20) < 5 * np.sqrt(num / 20)).all()
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02
