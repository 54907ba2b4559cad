"""Siblings that begin alike are scored as if each were alone, and computed once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.training.model import load_policy
from learner.training.packing import PackedRow, TokenSequence, nodes_of, pack
from tests.tiny_policy import write_tiny_policy

CPU = torch.device("cpu")


def sibling(prompt: list[int], completion: list[int]) -> TokenSequence:
    return TokenSequence(
        token_ids=np.array(prompt + completion, dtype=np.int32),
        loss_mask=np.array([0] * len(prompt) + [1] * len(completion), dtype=np.uint8),
    )


def group(prompt: list[int], completions: list[list[int]]) -> list[TokenSequence]:
    return [sibling(prompt, completion) for completion in completions]


def row_of(sequences: list[TokenSequence]) -> PackedRow:
    return pack(sequences, range(len(sequences)), CPU)


def test_a_shared_prompt_has_one_node_a_token_and_nothing_stands_behind_the_last_predictor() -> None:
    row = row_of(group([5, 6, 7, 8], [[10, 11], [10, 12], [10, 11]]))
    nodes = nodes_of(row)
    assert nodes.token_ids_T.tolist() == [5, 6, 7, 8, 10]
    assert nodes.positions_T.tolist() == [0, 1, 2, 3, 4]
    assert nodes.lengths == (5,)
    assert nodes.predictors_S.tolist() == [3, 4] * 3
    assert nodes.targets_S.tolist() == row.targets_S.tolist()


def test_equal_tokens_after_different_ones_are_different_nodes() -> None:
    nodes = nodes_of(row_of(group([5, 6, 7, 8], [[1, 3, 9], [2, 3, 9]])))
    assert nodes.token_ids_T.tolist() == [5, 6, 7, 8, 1, 3, 2, 3]
    assert nodes.lengths == (6, 6)


def test_a_row_of_strangers_is_left_as_it_is() -> None:
    row = row_of([sibling([4 + i] * 30, [1, 2]) for i in range(4)])
    assert row.forest is None
    assert nodes_of(row) is row


def test_a_sequence_that_nothing_is_learned_from_is_not_computed() -> None:
    unlearned = TokenSequence(token_ids=np.arange(20, dtype=np.int32), loss_mask=np.zeros(20, dtype=np.uint8))
    nodes = nodes_of(row_of([unlearned, *group([5, 6], [[1, 2], [1, 3]])]))
    assert nodes.token_ids_T.tolist() == [5, 6, 1]


@pytest.mark.parametrize("window", [None, 3])
def test_siblings_score_and_learn_like_each_alone(tmp_path: Path, window: int | None) -> None:
    policy = load_policy(write_tiny_policy(tmp_path))
    if window is not None:
        for module in policy.modules():
            if hasattr(module, "sliding_window"):
                module.sliding_window = window
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 40, size).tolist() for size in (9, 4)]
    stems = [rng.integers(3, 40, 6).tolist() for _ in range(3)]
    sequences = [
        sibling(prompt, [*stem[:cut], *rng.integers(3, 40, 2).tolist()])
        for prompt in prompts
        for stem in stems
        for cut in (6, 6, 3, 0)
    ]
    row = row_of(sequences)
    assert row.forest is not None
    assert len(row.forest.tokens_U) < 0.7 * len(row.token_ids_T)
    together = policy(row, temperature=0.7).logprobs_S
    alone = torch.cat([policy(pack(sequences, [i], CPU), temperature=0.7).logprobs_S for i in row.members])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(0))
    trained = list(policy.parameters())
    for got, want in zip(
        torch.autograd.grad((together * weights).sum(), trained),
        torch.autograd.grad((alone * weights).sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 5)),
        min_size=1,
        max_size=12,
    )
)
def test_every_node_is_one_beginning_and_every_beginning_is_one_node(
    drawn: list[tuple[list[int], int]],
) -> None:
    sequences = [sibling(tokens[:first], tokens[first:] or [0]) for tokens, first in drawn]
    row = row_of(sequences)
    needed = {
        tuple(sequence.token_ids[: end + 1])
        for sequence in sequences
        for end in range(len(sequence.token_ids) - 1)
    }
    forest = row.forest
    if forest is None:
        assert len(needed) > 0.9 * len(row.token_ids_T)
        return
    assert len(forest.tokens_U) == len(needed)
    assert sorted(forest.lengths, reverse=True) == list(forest.lengths)
    branches = torch.split(row.token_ids_T[forest.tokens_U][forest.branches_E], list(forest.lengths))
    begun = {tuple(branch[: end + 1].tolist()) for branch in branches for end in range(len(branch))}
    assert begun == needed
    assert torch.equal(forest.branches_E[forest.places_U], torch.arange(len(forest.tokens_U)))
