"""Preference updates on a tiny policy: exact gradients, whatever the packing; and what their configuration refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from learner.algorithms.preference_recipe import PreferenceLoss
from learner.training.config import OptimizerConfig
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.packing import TokenSequence, pack
from learner.training.parallel import Ranks
from learner.training.preference import (
    Pair,
    _pair_scores,
    _policy_metrics,
    compose_loss,
    mismatched,
    reference_of,
    sequences_of,
    update_policy,
    update_reward_model,
)
from learner.training.preference_config import preference_recipe
from learner.training.scalar import all_scored, as_scored, load_scalar_model
from learner.training.updater import Updater
from penstock.errors import ConfigError
from tests.tiny_policy import ADAM_EPS, write_tiny_policy

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


def settings(loss: PreferenceLoss):  # type: ignore[no-untyped-def]
    smoothed = loss in (PreferenceLoss.CDPO, PreferenceLoss.ROBUST)
    return preference_recipe(loss, beta=0.3, label_smoothing=0.1 if smoothed else None, margin=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("policy"), num_layers=1)


def make_updater(policy, *, row_tokens: int = 256) -> Updater:  # type: ignore[no-untyped-def]
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3, eps=ADAM_EPS))
    return Updater(policy, optimizer, ONE_RANK, row_tokens=row_tokens, max_grad_norm=1e9)


def make_pairs(num: int = 5) -> list[Pair]:
    draw = np.random.default_rng(0)

    def answer(prompt: np.ndarray) -> TokenSequence:
        tokens = draw.integers(3, 40, int(draw.integers(1, 9)))
        mask = np.r_[np.zeros(len(prompt)), np.ones(len(tokens))].astype(np.uint8)
        return TokenSequence(token_ids=np.r_[prompt, tokens].astype(np.int32), loss_mask=mask)

    pairs = []
    for _ in range(num):
        prompt = draw.integers(3, 40, int(draw.integers(2, 6)))
        pairs.append(Pair(chosen=answer(prompt), rejected=answer(prompt), margin=0.2))
    return pairs


def update(policy, loss: PreferenceLoss, *, row_tokens: int):  # type: ignore[no-untyped-def]
    """The report, and the weights after one update away from the reference."""
    updater, pairs, recipe = make_updater(policy, row_tokens=row_tokens), make_pairs(), settings(loss)
    others = mismatched(pairs, max_tokens=256) if loss is PreferenceLoss.KTO else []
    references = reference_of(updater.score, pairs, recipe, others=others)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    report = update_policy(updater, pairs, references, recipe, others=others, learning_rate=1e-3)
    return report, torch.cat([p.detach().flatten() for p in policy.parameters()]), references


@pytest.mark.parametrize("loss", PreferenceLoss)
def test_packing_changes_neither_loss_nor_weights(folder: Path, loss: PreferenceLoss) -> None:
    whole, weights, _ = update(load_policy(folder), loss, row_tokens=256)
    parts, other_weights, _ = update(load_policy(folder), loss, row_tokens=16)
    assert parts.update.loss == pytest.approx(whole.update.loss, rel=1e-5)
    assert parts.update.grad_norm == pytest.approx(whole.update.grad_norm, rel=1e-4)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(other_weights, weights, rtol=0, atol=2e-5)


@pytest.mark.parametrize("loss", [loss for loss in PreferenceLoss if loss is not PreferenceLoss.KTO])
def test_two_passes_give_the_gradient_of_the_loss_itself(folder: Path, loss: PreferenceLoss) -> None:
    """Against one backward pass through all sequences in one row."""
    report, _, references = update(load_policy(folder), loss, row_tokens=256)
    policy, pairs, recipe = load_policy(folder), make_pairs(), settings(loss)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    sequences = sequences_of(pairs)
    row = pack(sequences, range(len(sequences)), torch.device("cpu"))
    counts = [sequences[member].num_sampled for member in row.members]
    sums = [part.sum() for part in policy(row, temperature=1.0).logprobs_S.double().split(counts)]
    ordered = [sums[row.members.index(i)] for i in range(len(sequences))]
    scores = _pair_scores(torch.stack(ordered), pairs, references)
    exact = compose_loss(recipe)(scores).mean()
    exact.backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    assert report.update.loss == pytest.approx(exact.item(), rel=1e-5)
    assert report.update.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_a_mismatched_answer_is_the_next_pair_s_behind_the_own_prompt() -> None:
    pairs = make_pairs(2)
    first, second = mismatched(pairs, max_tokens=256)
    prompt = int(np.argmax(pairs[0].chosen.loss_mask))
    assert first.token_ids[:prompt].tolist() == pairs[0].chosen.token_ids[:prompt].tolist()
    assert first.num_sampled == pairs[1].chosen.num_sampled
    assert second.num_sampled == pairs[0].chosen.num_sampled


def test_a_mismatched_answer_is_of_another_prompt_and_there_is_none_where_all_have_the_same() -> None:
    first, second, third = make_pairs(3)
    pairs = [first, second, second, third, first]
    answers = [second, third, third, first, second]
    for sequence, pair, answer in zip(mismatched(pairs, max_tokens=256), pairs, answers, strict=True):
        expected = [*pair.chosen.prompt, *answer.chosen.token_ids[len(answer.chosen.prompt) :]]
        assert sequence.token_ids.tolist() == expected
    assert mismatched([first], max_tokens=256) == mismatched([second] * 3, max_tokens=256) == []


def test_a_lone_pair_s_own_reward_is_not_its_baseline(folder: Path) -> None:
    policy, pairs, recipe = load_policy(folder), make_pairs(1), settings(PreferenceLoss.KTO)
    updater = make_updater(policy)
    others = mismatched(pairs, max_tokens=256)
    references = reference_of(updater.score, pairs, recipe, others=others)
    for _ in range(3):
        report = update_policy(updater, pairs, references, recipe, others=others, learning_rate=1e-2)
    assert report.metrics["kto_kl"] == 0
    assert report.metrics["chosen_reward"] > 0


def test_a_mismatched_answer_is_cut_to_what_the_prompt_leaves_of_the_context() -> None:
    pairs = make_pairs(2)
    whole = mismatched(pairs, max_tokens=256)
    most = max(sequence.num_tokens for sequence in whole) - 1
    for sequence, cut in zip(whole, mismatched(pairs, max_tokens=most), strict=True):
        assert cut.token_ids.tolist() == sequence.token_ids[:most].tolist()
        assert cut.loss_mask.tolist() == sequence.loss_mask[:most].tolist()


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected"),
    [(PreferenceLoss.SIGMOID, 4, 2), (PreferenceLoss.SIMPO, 1, 2), (PreferenceLoss.IPO, 1, 2)],
)
def test_metrics_compare_what_the_loss_compares(loss: PreferenceLoss, chosen: float, rejected: float) -> None:
    """A likely token each in a longer chosen answer, an unlikely one in the rejected: means and sums disagree."""
    scores = torch.tensor([-4.0, -2.0]).double()
    mask = np.array([0, 1, 1, 1, 1], dtype=np.uint8)
    longer = TokenSequence(token_ids=np.arange(5, dtype=np.int32), loss_mask=mask)
    shorter = TokenSequence(token_ids=np.arange(2, dtype=np.int32), loss_mask=mask[:2])
    found = _pair_scores(scores, [Pair(chosen=longer, rejected=shorter)], None)
    assert _policy_metrics(found, settings(loss), 0.0) == pytest.approx(
        {
            "accuracy": float(chosen < rejected),
            "reward_margin": 0.3 * (rejected - chosen),
            "chosen_reward": -0.3 * chosen,
            "rejected_reward": -0.3 * rejected,
        }
    )


def test_a_reward_model_learns_to_prefer_the_chosen(folder: Path) -> None:
    model = load_scalar_model(folder)
    updater = make_updater(model)
    pairs = [
        Pair(chosen=as_scored(p.chosen), rejected=as_scored(p.rejected), margin=p.margin)
        for p in make_pairs()
    ]
    first = update_reward_model(updater, pairs, centering=0.01, learning_rate=1e-2)
    assert first.update.loss == pytest.approx(np.log(1 + np.exp(0.2)), rel=1e-5)
    for _ in range(30):
        last = update_reward_model(updater, pairs, centering=0.01, learning_rate=1e-2)
    assert last.metrics["accuracy"] == 1.0
    assert last.update.loss < 0.1


def test_a_reward_is_read_off_the_last_token_alone(folder: Path) -> None:
    model = load_scalar_model(folder)
    torch.nn.init.normal_(model.causal_lm.score.weight, generator=torch.Generator().manual_seed(0))
    sequences = sequences_of(make_pairs())
    rewards = make_updater(model, row_tokens=16).score(all_scored(sequences))
    trunk = AutoModel.from_pretrained(folder)
    for sequence, reward in zip(sequences, rewards, strict=True):
        states = trunk(torch.from_numpy(sequence.token_ids).long()[None]).last_hidden_state
        assert reward.item() == pytest.approx(model.causal_lm.score(states[0, -1]).item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "numbers", "message"),
    [
        ("sigmoid", {"label_smoothing": 0.1}, "label_smoothing has no effect on loss sigmoid"),
        ("ipo", {"margin": 0.1}, "margin has no effect on loss ipo"),
        ("cdpo", {}, "loss cdpo needs more than 0"),
        ("robust", {"label_smoothing": 0.5}, "less than 0.5"),
        ("kto", {"beta": 0.0}, "expected more than 0"),
    ],
)
def test_numbers_that_a_loss_ignores_or_cannot_use_are_refused(
    loss: str, numbers: dict[str, float], message: str
) -> None:
    given = {"beta": None, "label_smoothing": None, "margin": None} | numbers
    with pytest.raises(ConfigError, match=message):
        preference_recipe(PreferenceLoss(loss), **given)  # type: ignore[arg-type]
