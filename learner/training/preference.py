"""Updates on pairs of sequences, of which one is better.

A pair's loss needs both of its sequences, which packing may put into different rows, or on
different ranks. So an update takes two passes: the first scores all sequences; from the
scores, on the host, follow the exact loss and its derivative by each sequence's score.
The second pass has a loss that is linear in the scores with just these derivatives, and
so the same gradient, whatever the packing.

P   pairs of an update; sequences stand in the order chosen 0..P-1, rejected 0..P-1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from learner.algorithms import preference
from learner.algorithms.preference import PairLoss, PairScores
from learner.algorithms.preference_recipe import BY_TOKEN, PreferenceLoss, PreferenceRecipe
from learner.algorithms.rewards import bradley_terry
from learner.algorithms.sums import Sums
from learner.training.packing import PackedRow, TokenSequence
from learner.training.policy import TokenScores
from learner.training.updater import Updater, UpdateReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt."""

    chosen: TokenSequence
    rejected: TokenSequence
    margin: float = 0.0
    """By how much a reward model must prefer the chosen one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReference:
    """log ref of a pair's answers, summed over their tokens."""

    chosen: float
    rejected: float
    mismatched: float = 0.0
    """Of another pair's chosen answer to this pair's prompt; only for KTO, where prompts differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    update: UpdateReport
    """Its loss is the pairs' mean."""
    metrics: dict[str, float]


def sequences_of(pairs: Sequence[Pair]) -> list[TokenSequence]:
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def mismatched(pairs: Sequence[Pair], *, max_tokens: int) -> list[TokenSequence]:
    """Each prompt with the chosen answer of the next pair of another prompt: KTO measures the divergence on these.

    Empty where all pairs have the same prompt. max_tokens: the policy's context. An answer that was given to a
    shorter prompt is cut to what is left of it.
    """
    prompts = [pair.chosen.prompt.tobytes() for pair in pairs]
    if len(set(prompts)) < 2:
        return []
    joined = []
    other = next(index for index, prompt in enumerate(prompts) if prompt != prompts[-1])
    for index in reversed(range(len(pairs))):
        following = (index + 1) % len(pairs)
        if prompts[following] != prompts[index]:
            other = following
        joined.append(_joined(pairs[index].chosen, pairs[other].chosen, max_tokens))
    return joined[::-1]


def _joined(prompt_of: TokenSequence, answer_of: TokenSequence, max_tokens: int) -> TokenSequence:
    prompt, answer = _first_learned(prompt_of), _first_learned(answer_of)
    token_ids = np.concatenate([prompt_of.token_ids[:prompt], answer_of.token_ids[answer:]])
    loss_mask = np.concatenate([prompt_of.loss_mask[:prompt], answer_of.loss_mask[answer:]])
    return TokenSequence(token_ids=token_ids[:max_tokens], loss_mask=loss_mask[:max_tokens])


def _first_learned(sequence: TokenSequence) -> int:
    return int(np.argmax(sequence.loss_mask))


def summed(updater: Updater, sequences: Sequence[TokenSequence]) -> NDArray[np.float64]:
    """The policy's log-probability of each sequence's learned tokens: [N]."""
    return np.array([scores_S.sum(dtype=np.float64) for scores_S in updater.score(sequences)])


def reference_of(
    score: Callable[[Sequence[TokenSequence]], list[NDArray[np.float32]]],
    pairs: Sequence[Pair],
    recipe: PreferenceRecipe,
    *,
    others: Sequence[TokenSequence] = (),
) -> list[PairReference] | None:
    """Reference log-probabilities of pairs; None for a loss without a reference. score: of the reference policy.

    others: `mismatched` of the pairs; only for KTO.
    """
    if not recipe.has_reference:
        return None
    sums = [float(part.sum(dtype=np.float64)) for part in score([*sequences_of(pairs), *others])]
    count = len(pairs)
    return [
        PairReference(
            chosen=sums[i], rejected=sums[count + i], mismatched=sums[2 * count + i] if others else 0.0
        )
        for i in range(count)
    ]


def update_policy(
    updater: Updater,
    pairs: Sequence[Pair],
    references: Sequence[PairReference] | None,
    recipe: PreferenceRecipe,
    *,
    others: Sequence[TokenSequence] = (),
    learning_rate: float,
) -> PairReport:
    """One update of a preference loss. others: `mismatched` of the pairs, in their order; only for KTO.

    Without them, KTO's divergence counts as 0.
    """
    sequences = sequences_of(pairs)
    scores = summed(updater, [*sequences, *others])
    answers = torch.tensor(scores[: len(sequences)], requires_grad=True)
    kl = _divergence(scores[len(sequences) :], references) if len(others) else 0.0
    found = _pair_scores(answers, pairs, references)
    loss = compose_loss(recipe, kl=kl)(found).mean()
    report = _linear_update(updater, sequences, answers, loss, learning_rate=learning_rate)
    return PairReport(update=report, metrics=_policy_metrics(found, recipe, kl))


def update_reward_model(
    updater: Updater, pairs: Sequence[Pair], *, centering: float, learning_rate: float
) -> PairReport:
    """One update of Bradley-Terry's loss. The updater's model gives one reward a sequence (`scalar.py`)."""
    sequences = sequences_of(pairs)
    rewards = torch.tensor(summed(updater, sequences), requires_grad=True)
    chosen_P, rejected_P = torch.split(rewards, len(pairs))
    margins_P = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
    loss = bradley_terry(chosen_P, rejected_P, margins_P, centering=centering).mean()
    report = _linear_update(updater, sequences, rewards, loss, learning_rate=learning_rate)
    gap_P = (chosen_P - rejected_P).detach()
    metrics = {"accuracy": float((gap_P > 0).double().mean()), "reward_gap": float(gap_P.mean())}
    return PairReport(update=report, metrics=metrics)


def compose_loss(recipe: PreferenceRecipe, *, kl: float = 0.0) -> PairLoss:
    """The function of a recipe."""
    beta, smoothing = recipe.beta, recipe.label_smoothing
    losses: dict[PreferenceLoss, PairLoss] = {
        PreferenceLoss.SIGMOID: partial(preference.sigmoid, beta=beta),
        PreferenceLoss.CDPO: partial(preference.conservative, beta=beta, label_smoothing=smoothing),
        PreferenceLoss.ROBUST: partial(preference.robust, beta=beta, label_smoothing=smoothing),
        PreferenceLoss.HINGE: partial(preference.hinge, beta=beta),
        PreferenceLoss.IPO: partial(preference.ipo, beta=beta),
        PreferenceLoss.SIMPO: partial(preference.simpo, beta=beta, margin=recipe.margin),
        PreferenceLoss.ORPO: partial(preference.orpo, beta=beta),
        PreferenceLoss.KTO: partial(preference.kto, beta=beta, kl=kl),
    }
    return losses[recipe.loss]


def _divergence(scores: NDArray[np.float64], references: Sequence[PairReference] | None) -> float:
    assert references is not None
    return max(0.0, float(np.mean(scores - [reference.mismatched for reference in references])))


def _pair_scores(
    answers: torch.Tensor, pairs: Sequence[Pair], references: Sequence[PairReference] | None
) -> PairScores:
    chosen_P, rejected_P = torch.split(answers, len(pairs))
    known = references or [PairReference(chosen=0.0, rejected=0.0)] * len(pairs)

    def constants(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return PairScores(
        chosen_P=chosen_P,
        rejected_P=rejected_P,
        chosen_reference_P=constants([reference.chosen for reference in known]),
        rejected_reference_P=constants([reference.rejected for reference in known]),
        chosen_tokens_P=constants([pair.chosen.num_sampled for pair in pairs]),
        rejected_tokens_P=constants([pair.rejected.num_sampled for pair in pairs]),
    )


def _policy_metrics(found: PairScores, recipe: PreferenceRecipe, kl: float) -> dict[str, float]:
    chosen_P, rejected_P = found.chosen_ratio.detach(), found.rejected_ratio.detach()
    if recipe.loss in BY_TOKEN:
        chosen_P, rejected_P = chosen_P / found.chosen_tokens_P, rejected_P / found.rejected_tokens_P
    ratio_P = chosen_P - rejected_P
    metrics = {
        "accuracy": float((ratio_P > 0).double().mean()),
        "reward_margin": float(recipe.beta * ratio_P.mean()),
        "chosen_reward": float(recipe.beta * chosen_P.mean()),
        "rejected_reward": float(recipe.beta * rejected_P.mean()),
    }
    return metrics | ({"kto_kl": kl} if recipe.loss is PreferenceLoss.KTO else {})


def _linear_update(
    updater: Updater,
    sequences: Sequence[TokenSequence],
    scores: torch.Tensor,
    loss: torch.Tensor,
    *,
    learning_rate: float,
) -> UpdateReport:
    """An update with the gradient of `loss`, which depends on the model through `scores` alone: [N]."""
    (slopes,) = torch.autograd.grad(loss, scores)
    weights = [
        np.full(sequence.num_sampled, slope, dtype=np.float32)
        for sequence, slope in zip(sequences, slopes.tolist(), strict=True)
    ]

    def objective(row: PackedRow, found: TokenScores) -> tuple[torch.Tensor, Sums]:
        return (row.gather(weights) * found.logprobs_S).sum(), {"entropy_sum": found.entropy_S.sum()}

    report = updater.update(sequences, objective, learning_rate=learning_rate)
    return replace(report, loss=float(loss.detach()) if np.isfinite(report.loss) else report.loss)
