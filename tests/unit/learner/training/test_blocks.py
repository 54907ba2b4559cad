"""Parts of tensors, and what two of them have in common."""

from __future__ import annotations

import torch

from learner.training.blocks import block_of, is_copy, overlap


def test_a_tensor_that_is_not_divided_is_one_block_and_the_first_rank_s() -> None:
    tensor = torch.zeros(3, 5)
    assert block_of(tensor, 1) == (slice(0, 3), slice(0, 5))
    assert [is_copy(tensor, rank) for rank in range(3)] == [False, True, True]
    assert block_of(torch.zeros(()), 0) == ()


def test_what_two_blocks_share_is_told_in_the_places_of_each() -> None:
    rows = (slice(2, 6), slice(0, 8))
    columns = (slice(0, 4), slice(4, 8))
    assert overlap(rows, columns) == ((slice(0, 2), slice(4, 8)), (slice(2, 4), slice(0, 4)))
    assert overlap(rows, (slice(6, 9), slice(0, 8))) is None
    assert overlap(rows, (slice(2, 2), slice(0, 8))) is None
