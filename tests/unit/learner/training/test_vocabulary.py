"""Log-probabilities from parts of a vocabulary are those of the whole; of two parts: test_tensor_ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from learner.training.config import Device, Precision
from learner.training.logprobs import token_logprobs
from learner.training.parallel import open_ranks
from learner.training.vocabulary import Part, shared_token_logprobs


@pytest.mark.parametrize("chunk_elements", [None, 37 * 4])
@pytest.mark.parametrize("num_sampled", [0, 11])
def test_a_single_part_is_the_whole_in_any_number_of_chunks(
    num_sampled: int, chunk_elements: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_sampled, 8, generator=generator)
    weight = torch.randn(37, 8, generator=generator)
    targets = torch.randint(37, (num_sampled,), generator=generator)
    factors = torch.randn(num_sampled, generator=generator)
    ranks = open_ranks(Device.CPU, Precision.BFLOAT16)
    try:
        assert dist.group.WORLD is not None
        found = []
        for is_shared in (True, False):
            inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            if is_shared:
                part = Part(weight_vH=inputs[1], start=0, group=dist.group.WORLD)
                scores = shared_token_logprobs(
                    inputs[0], part, targets, temperature=0.7, chunk_elements=chunk_elements
                )
            else:
                scores = token_logprobs(*inputs, targets, temperature=0.7)
            found.append([*scores, *torch.autograd.grad((scores[0] * factors).sum(), inputs)])
    finally:
        ranks.close()
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
