"""A reward model scores answers in batches as it does alone, and as transformers does."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from environments.reward_model import RewardModel
from learner.offline.main import main
from learner.offline.rm import padding_id
from penstock.errors import ConfigError
from penstock.trajectory import RewardStatus, Task
from tests.tiny_policy import write_tiny_policy

PROMPTS = ("spell stone: ", "spell river: ", "spell cloud: ")
ANSWERS = ("enots", "", "revir and more", "x", "duolc" * 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained reward model."""
    folder = tmp_path_factory.mktemp("model")
    pairs = [{"prompt": prompt, "chosen": "abc" * 3, "rejected": "xyz"} for prompt in PROMPTS]
    chat = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for prompt in PROMPTS
    ]
    rows = [json.dumps(row) for row in [*pairs, *chat]]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    policy = write_tiny_policy(folder / "policy")
    places = ["--policy", str(policy), "--data", str(folder / "pairs.jsonl"), "--out", str(folder / "rm")]
    assert main(["rm", *places, "--num_steps", "4", "--optimizer.learning_rate", "1e-2"]) == 0
    return folder


def make(folder: Path, **changed: Any) -> RewardModel:
    settings = {
        "path": str(folder / "rm"),
        "prompts": str(folder / "pairs.jsonl"),
        "prompt_key": "prompt",
        "eval_fraction": 0.0,
        "device": "cpu",
        "dtype": "float32",
        "batch_tokens": 64,
    }
    return RewardModel(**(settings | changed))


def task(index: int) -> Task:
    return Task("reward_model:rm", "train", index, 0)


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def direct(folder: Path, prompt: str, answer: str) -> float:
    """By transformers alone: one sequence, without padding."""
    model, tokenizer = loaded(folder / "rm")
    ids = tokenizer(prompt).input_ids + tokenizer(answer).input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def test_a_batch_gets_the_numbers_that_transformers_gives_each_answer(folder: Path) -> None:
    model = make(folder)
    answers = [(index, answer) for index in range(3) for answer in ANSWERS]
    results = model.score_batch([(task(index), answer) for index, answer in answers])
    rewards = [result.reward.value for result in results]
    assert rewards == pytest.approx([direct(folder, PROMPTS[i], answer) for i, answer in answers], abs=1e-5)
    assert len({round(reward or 0.0, 4) for reward in rewards}) > 5
    assert all(result.done for result in results)


def test_messages_are_rendered_as_in_training(folder: Path) -> None:
    """The tiny tokeniser's template joins contents, so that text and messages are scored alike."""
    model = make(folder)
    (text,) = model.score_batch([(task(0), "yes")])
    (chat,) = model.score_batch([(task(3), "yes")])
    assert chat.reward.value == pytest.approx(text.reward.value, abs=1e-5)
    assert [message.role for message in model.prompt(task(3))] == ["user"]
    assert model.prompt(task(0)) == model.prompt(task(3))


def test_an_answer_that_the_context_cannot_hold_is_unscorable_and_spoils_no_other(folder: Path) -> None:
    results = make(folder).score_batch([(task(0), "a" * 1000), (task(0), "enots")])
    assert results[0].reward.status is RewardStatus.UNSCORABLE
    assert "the policy's context has room for 256" in results[0].reward.message
    assert results[1].reward.value == pytest.approx(direct(folder, PROMPTS[0], "enots"), abs=1e-5)


def test_splits_and_digest_follow_the_prompts(folder: Path) -> None:
    whole, parted = make(folder).describe(), make(folder, eval_fraction=0.6).describe()
    assert whole.splits == {"train": 6}
    assert sum(parted.splits.values()) == 6
    assert "eval" in parted.splits
    assert whole.digest != parted.digest
    assert make(folder).describe().digest == whole.digest


def test_what_is_no_reward_model_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the weights lack score\.weight; expected a reward model"):
        make(folder, path=str(folder / "policy"))
    with pytest.raises(ConfigError, match="no sequence classifier can be loaded"):
        make(folder, path=str(folder / "none"))
    with pytest.raises(ConfigError, match=r"line 1: has no 'question'; it has chosen, prompt, rejected"):
        make(folder, prompt_key="question")


def test_a_written_model_never_pads_with_the_token_that_rewards_are_read_off(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "rm")
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    for pad in (None, tokenizer.eos_token):
        tokenizer.pad_token = pad
        assert padding_id(tokenizer) not in (None, tokenizer.eos_token_id)
