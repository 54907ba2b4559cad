"""What a policy's answers come to: mean reward with its error, pass@k, lengths. Pure.

n  answers of one prompt that have a reward
c  those of them with at least the threshold's reward
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from penstock.errors import ConfigError

MEAN = "mean"
"""What the row over all environments is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One episode that came to a reward."""

    prompt: int
    reward: float
    num_tokens: int
    """Sampled."""
    truncated: bool
    """Its last turn was cut at a token limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one environment's answers, or the mean of several environments' scores."""

    num_prompts: int
    """With at least one answer."""
    num_answers: int
    reward_mean: float
    """Over answers."""
    reward_error: float | None
    """Standard error of it, clustered by prompt; None where there is a single prompt."""
    pass_at: Mapping[int, float | None]
    """By k: the chance that one of k answers passes, over the prompts with at least k answers; None without any."""
    pass_prompts: Mapping[int, int]
    """How many prompts those are."""
    truncated_share: float
    tokens_mean: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k answers, drawn from n without replacement, is among the c that pass.

    Unbiased for pass@k (Chen et al. 2021, eq. 1): 1 - C(n-c, k) / C(n, k), as the product of
    1 - k / i over i in (n-c, n], in which nothing is large.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ConfigError(f"pass@{k} of {n} answers, {c} of which pass: expected 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def clustered_error(rewards: Mapping[int, Sequence[float]]) -> float | None:
    """Standard error of the mean over all rewards, which come in clusters; None with a single cluster.

    sqrt(G / (G - 1) * sum over clusters of (sum of (r - mean))^2) / N: with clusters of equal size,
    the standard deviation of their means over sqrt(G).
    """
    num_clusters, num_rewards = len(rewards), sum(map(len, rewards.values()))
    if num_clusters < 2:
        return None
    mean = math.fsum(reward for cluster in rewards.values() for reward in cluster) / num_rewards
    squares = math.fsum(math.fsum(reward - mean for reward in cluster) ** 2 for cluster in rewards.values())
    return math.sqrt(num_clusters / (num_clusters - 1) * squares) / num_rewards


def score(answers: Iterable[Answer], *, pass_at: Sequence[int], threshold: float) -> Score | None:
    """None without an answer: nothing is not 0. threshold: the least reward that passes."""
    known = list(answers)
    if not known:
        return None
    rewards: defaultdict[int, list[float]] = defaultdict(list)
    for answer in known:
        rewards[answer.prompt].append(answer.reward)
    chances = {k: _chances(rewards.values(), k, threshold) for k in pass_at}
    return Score(
        num_prompts=len(rewards),
        num_answers=len(known),
        reward_mean=math.fsum(answer.reward for answer in known) / len(known),
        reward_error=clustered_error(rewards),
        pass_at={k: _mean(found) for k, found in chances.items()},
        pass_prompts={k: len(found) for k, found in chances.items()},
        truncated_share=sum(answer.truncated for answer in known) / len(known),
        tokens_mean=sum(answer.num_tokens for answer in known) / len(known),
    )


def mean_score(scores: Sequence[Score]) -> Score | None:
    """Each environment counts as much as any other; their errors are independent."""
    if not scores:
        return None
    errors = [each.reward_error for each in scores if each.reward_error is not None]
    num = len(scores)
    of_all = len(errors) == num
    return Score(
        num_prompts=sum(each.num_prompts for each in scores),
        num_answers=sum(each.num_answers for each in scores),
        reward_mean=math.fsum(each.reward_mean for each in scores) / num,
        reward_error=math.sqrt(math.fsum(error**2 for error in errors)) / num if of_all else None,
        pass_at={k: _mean_of_all([each.pass_at[k] for each in scores]) for k in scores[0].pass_at},
        pass_prompts={k: sum(each.pass_prompts[k] for each in scores) for k in scores[0].pass_prompts},
        truncated_share=math.fsum(each.truncated_share for each in scores) / num,
        tokens_mean=math.fsum(each.tokens_mean for each in scores) / num,
    )


def check_pass_at(pass_at: Sequence[int], samples: int, name: str) -> None:
    """Raises ConfigError for a k below 1, or of more answers than a prompt has. name: of the setting."""
    for k in pass_at:
        if not 1 <= k <= samples:
            raise ConfigError(
                f"{name} has {k}; pass@k needs 1 to as many answers as each prompt has, which are {samples}: ask for "
                "more answers a prompt, or leave it out"
            )


def _chances(rewards: Iterable[Sequence[float]], k: int, threshold: float) -> list[float]:
    return [
        pass_at_k(len(of_prompt), sum(reward >= threshold for reward in of_prompt), k)
        for of_prompt in rewards
        if len(of_prompt) >= k
    ]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if len(known) == len(values) else None
