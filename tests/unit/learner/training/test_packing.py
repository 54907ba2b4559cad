import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.training.packing import TokenSequence, join_rows, pack, plan_rows, siblings

CPU = torch.device("cpu")


def sequence(token_ids: list[int], loss_mask: list[int]) -> TokenSequence:
    return TokenSequence(
        token_ids=np.asarray(token_ids, dtype=np.int32), loss_mask=np.asarray(loss_mask, dtype=np.uint8)
    )


def test_a_row_lays_sequences_end_to_end_longest_first() -> None:
    row = pack([sequence([5, 6], [0, 1]), sequence([7, 8, 9], [0, 1, 1])], [0, 1], CPU)
    assert row.members == (1, 0)
    assert row.lengths == (3, 2)
    assert row.token_ids_T.tolist() == [7, 8, 9, 5, 6]
    assert row.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert row.predictors_S.tolist() == [0, 1, 3]
    assert row.targets_S.tolist() == [8, 9, 6]


def test_nothing_predicts_a_first_token_even_if_it_was_sampled() -> None:
    only = sequence([5, 6], [1, 1])
    assert only.num_sampled == 1
    assert only.sampled(np.array([10.0, 20.0])).tolist() == [20.0]
    assert pack([only], [0], CPU).targets_S.tolist() == [6]


def test_values_are_gathered_in_the_row_s_order() -> None:
    row = pack([sequence([5, 6], [0, 1]), sequence([7, 8, 9], [0, 1, 1])], [0, 1], CPU)
    assert row.gather([np.array([1.0]), np.array([2.0, 3.0])]).tolist() == [2.0, 3.0, 1.0]


def test_a_row_without_members_has_tokens_but_nothing_to_learn() -> None:
    row = pack([sequence([5, 6, 7], [0, 1, 1])], [], CPU)
    assert row.members == ()
    assert row.token_ids_T.numel() == 2
    assert row.targets_S.numel() == 0
    assert row.gather([np.array([1.0, 2.0])]).numel() == 0


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    row_tokens=st.integers(16, 200),
    num_ranks=st.integers(1, 4),
)
def test_every_sequence_is_in_one_row_within_the_budget(
    lengths: list[int], row_tokens: int, num_ranks: int
) -> None:
    plan = plan_rows(lengths, row_tokens=row_tokens, num_ranks=num_ranks, hidden_size=32)
    assert len(plan) == num_ranks
    assert len({len(rows) for rows in plan}) == 1
    rows = [row for rank in plan for row in rank]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) <= 1 or sum(lengths[index] for index in row) <= row_tokens
    assert plan == plan_rows(lengths, row_tokens=row_tokens, num_ranks=num_ranks, hidden_size=32)


def test_ranks_get_rows_of_about_the_same_cost() -> None:
    lengths = list(np.random.default_rng(0).integers(10, 200, 200))
    plan = plan_rows(lengths, row_tokens=4096, num_ranks=4, hidden_size=64)
    tokens = [sum(lengths[index] for row in rank for index in row) for rank in plan]
    assert max(tokens) < 1.05 * min(tokens)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_small_batch_is_spread_over_all_ranks(num_ranks: int) -> None:
    plan = plan_rows([10] * 6, row_tokens=4096, num_ranks=num_ranks, hidden_size=32)
    assert [len(rows) for rows in plan] == [1] * num_ranks
    assert all(len(rows[0]) == 6 // num_ranks for rows in plan)


def test_joined_rows_are_spread_over_as_few_passes_as_the_bound_allows() -> None:
    rows = [(0, 3), (1,), (), (2, 4, 5), (6,)]
    assert join_rows(rows, rows_per_pass=1) == rows
    assert join_rows(rows, rows_per_pass=2) == [(0, 3, 2, 4, 5), (1, 6), ()]
    assert join_rows(rows, rows_per_pass=4) == [(0, 3, 6), (1, 2, 4, 5)]
    assert join_rows(rows, rows_per_pass=5) == [(0, 3, 1, 2, 4, 5, 6)]


def with_prompt(prompt: list[int], num_sampled: int) -> TokenSequence:
    return sequence(prompt + [9] * num_sampled, [0] * len(prompt) + [1] * num_sampled)


def test_sequences_of_one_prompt_are_parts_of_bounded_size() -> None:
    batch = [with_prompt([group, 5, 6, 7], 4) for _ in range(5) for group in (1, 2)]
    assert siblings(batch, most_tokens=24) == [(0, 2, 4), (1, 3, 5), (6, 8), (7, 9)]


def test_sequences_whose_prompt_is_little_of_them_stand_alone() -> None:
    batch = [with_prompt([5], 40), with_prompt([5], 40), with_prompt([6, 7], 1)]
    assert siblings(batch, most_tokens=1000) == [(0,), (1,), (2,)]


def test_a_sequence_larger_than_a_part_may_be_is_a_part_by_itself() -> None:
    batch = [with_prompt([5] * 20, 1), with_prompt([5] * 20, 2)]
    assert siblings(batch, most_tokens=8) == [(0,), (1,)]


def test_parts_stay_together_and_rows_stay_within_the_budget() -> None:
    lengths = [10] * 24
    parts = [tuple(range(start, start + 3)) for start in range(0, 24, 3)]
    plan = plan_rows(lengths, row_tokens=70, num_ranks=2, hidden_size=32, parts=parts)
    rows = [row for rank in plan for row in rank]
    assert sorted(member for row in rows for member in row) == list(range(24))
    assert all(10 * len(row) <= 70 for row in rows)
    for part in parts:
        assert sum(set(part) <= set(row) for row in rows) == 1
