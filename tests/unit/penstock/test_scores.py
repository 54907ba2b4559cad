from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest

from penstock.errors import ConfigError
from penstock.scores import Answer, check_pass_at, clustered_error, mean_score, pass_at_k, score


def answers(*rewards: tuple[float, ...]) -> list[Answer]:
    """One prompt a tuple, each answer two tokens long and none cut."""
    return [
        Answer(prompt=prompt, reward=reward, num_tokens=2, truncated=False)
        for prompt, of_prompt in enumerate(rewards)
        for reward in of_prompt
    ]


def test_a_score_is_the_mean_reward_and_the_chance_to_pass():
    found = score(answers((1.0, 0.0), (0.0, 0.0)), pass_at=(1, 2), threshold=1.0)
    assert found is not None
    assert (found.num_prompts, found.num_answers, found.reward_mean) == (2, 4, 0.25)
    assert found.pass_at == {1: 0.25, 2: 0.5}
    assert (found.tokens_mean, found.truncated_share) == (2.0, 0.0)


def test_no_answer_is_no_score_and_not_0():
    assert score([], pass_at=(1,), threshold=1.0) is None
    assert mean_score([]) is None


@pytest.mark.parametrize(
    ("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 3), (10, 1, 10), (200, 7, 100), (200, 0, 5)]
)
def test_pass_at_k_is_one_minus_the_share_of_draws_without_a_pass(n: int, c: int, k: int):
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


def test_pass_at_k_equals_a_count_over_every_draw():
    passes = [True, True, False, False, False]
    draws = list(itertools.combinations(passes, 3))
    assert pass_at_k(5, 2, 3) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_stays_finite_for_more_answers_than_a_float_can_count_draws_of():
    assert 0.0 < pass_at_k(100_000, 10, 50_000) <= 1.0


def test_more_draws_than_answers_are_refused():
    with pytest.raises(ConfigError, match=r"pass@3 of 2 answers"):
        pass_at_k(2, 1, 3)
    with pytest.raises(ConfigError, match="ask for more answers a prompt"):
        check_pass_at((1, 4), 2, "pass_at")


def test_a_prompt_with_too_few_answers_is_left_out_of_that_pass_and_said_so():
    found = score(answers((1.0, 1.0), (0.0,)), pass_at=(1, 2, 3), threshold=1.0)
    assert found is not None
    assert found.pass_at == {1: 0.5, 2: 1.0, 3: None}
    assert found.pass_prompts == {1: 2, 2: 1, 3: 0}


def test_the_threshold_says_what_passes():
    found = score(answers((0.5,), (0.4,)), pass_at=(1,), threshold=0.5)
    assert found is not None
    assert found.pass_at == {1: 0.5}


def test_the_error_of_one_answer_a_prompt_is_the_usual_standard_error():
    rewards = [random.Random(1).random() for _ in range(20)]
    mean = sum(rewards) / 20
    usual = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 19 / 20)
    assert clustered_error({i: [reward] for i, reward in enumerate(rewards)}) == pytest.approx(usual)


def test_answers_that_repeat_each_other_make_no_error_smaller():
    single = {0: [1.0], 1: [0.0], 2: [0.0]}
    repeated = {prompt: rewards * 50 for prompt, rewards in single.items()}
    assert clustered_error(repeated) == pytest.approx(clustered_error(single))


def test_a_single_prompt_has_no_error():
    assert clustered_error({0: [1.0, 0.0]}) is None


def test_the_mean_counts_every_environment_alike():
    small = score(answers((1.0,), (1.0,)), pass_at=(1,), threshold=1.0)
    large = score(answers(*[(0.0,)] * 8), pass_at=(1,), threshold=1.0)
    assert small is not None
    assert large is not None
    found = mean_score([small, large])
    assert found is not None
    assert (found.reward_mean, found.pass_at[1], found.num_answers) == (0.5, 0.5, 10)
