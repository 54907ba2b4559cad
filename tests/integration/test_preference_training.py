"""`penstock train dpo` and `penstock train rm`, and what they leave behind, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
)

from learner.algorithms.preference_recipe import PreferenceLoss
from learner.offline import dpo
from learner.offline.main import main
from learner.training.packing import TokenSequence
from learner.training.updater import Updater
from penstock.errors import ConfigError
from tests.tiny_policy import EOS_ID, VOCAB_SIZE, write_family, write_tiny_policy

CONFIG = """
policy = "{folder}/policy"
data = "{folder}/pairs.jsonl"
out = "{folder}/out"
num_steps = 30
batch_pairs = 8
device = "cpu"
[optimizer]
learning_rate = 1e-2
"""


def write_task(tmp_path: Path) -> Path:
    """To a digit the letter of its place is right, and any other is wrong."""
    write_tiny_policy(tmp_path / "policy")
    pairs = [
        {"prompt": f"{digit}=", "chosen": chr(ord("a") + digit), "rejected": chr(ord("a") + (digit + k) % 10)}
        for digit in range(10)
        for k in (1, 4, 7)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "run.toml"


def tokens(tokenizer, text: str) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])


@pytest.mark.parametrize("loss", [PreferenceLoss.SIGMOID, PreferenceLoss.ORPO, PreferenceLoss.KTO])
def test_a_policy_learns_the_preference_and_transformers_loads_it(
    tmp_path: Path, loss: PreferenceLoss
) -> None:
    assert main(["dpo", str(write_task(tmp_path)), "--loss", loss]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    right = 0
    for digit in range(10):
        logits = policy(tokens(tokenizer, f"{digit}=")[:, :-1]).logits[0, -1]
        chosen, rejected = (tokenizer.convert_tokens_to_ids(chr(ord("a") + (digit + k) % 10)) for k in (0, 4))
        right += int(logits[chosen] > logits[rejected])
    assert right >= 9


def test_a_reward_model_prefers_the_chosen_in_transformers_own_class(tmp_path: Path) -> None:
    assert (
        main(["rm", str(write_task(tmp_path)), "--num_steps", "100", "--optimizer.learning_rate", "5e-3"])
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1
    rewards = [
        [
            model(tokens(tokenizer, f"{digit}={chr(ord('a') + (digit + k) % 10)}")).logits.item()
            for k in (0, 4)
        ]
        for digit in range(10)
    ]
    assert sum(right > wrong for right, wrong in rewards) >= 9


def write_short_context(tmp_path: Path, *pairs: dict[str, str]) -> str:
    """A task for a policy of sixteen positions, which fails where it has more tokens."""
    path = write_task(tmp_path)
    sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 4}
    ends = {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID}
    write_family(tmp_path / "policy", GPT2Config(vocab_size=VOCAB_SIZE, **sizes, **ends))
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    return str(path)


def test_a_reward_model_s_sequences_and_what_stands_behind_them_fit_its_context(tmp_path: Path) -> None:
    fits = {"prompt": "1" * 10, "chosen": "abcd", "rejected": "b"}
    assert main(["rm", write_short_context(tmp_path, fits), "--num_steps", "1"]) == 0
    longer = {**fits, "chosen": "abcde"}
    config = write_short_context(tmp_path, longer)
    with pytest.raises(ConfigError, match="has 16 tokens; the policy's context has room for 15"):
        main(["rm", config, "--num_steps", "1", "--out", str(tmp_path / "second")])


def test_kto_cuts_another_pair_s_answer_to_the_context(tmp_path: Path) -> None:
    long_prompt = {"prompt": "1" * 12, "chosen": "a", "rejected": "b"}
    long_answer = {"prompt": "2", "chosen": "a" * 13, "rejected": "b"}
    config = write_short_context(tmp_path, long_prompt, long_answer)
    assert main(["dpo", config, "--loss", "kto", "--num_steps", "1"]) == 0


@pytest.mark.parametrize("loss", [PreferenceLoss.SIGMOID, PreferenceLoss.KTO])
def test_a_reference_scored_in_parts_is_the_one_scored_at_once(
    tmp_path: Path, loss: PreferenceLoss, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_task(tmp_path)
    train = ["dpo", str(config), "--loss", loss, "--num_steps", "3", "--out"]
    scored: list[int] = []
    score = Updater.score

    def counted(updater: Updater, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float32]]:
        scored.append(len(sequences))
        return score(updater, sequences)

    monkeypatch.setattr(Updater, "score", counted)
    main([*train, str(tmp_path / "whole")])
    at_once = max(scored)
    scored.clear()
    monkeypatch.setattr(dpo, "PAIRS_PER_SCORING", 8)
    main([*train, str(tmp_path / "parts")])
    assert max(scored) <= 8 * 3 < at_once
    assert "the reference has scored 24 of 30 pairs" in capfd.readouterr().err
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-4)


def test_a_broken_pair_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    config = write_task(tmp_path)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('\n{"prompt": "1=", "chosen": "b"}')
    command = [sys.executable, "-m", "penstock.cli", "train", "dpo", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert 'pairs.jsonl, line 31: "rejected" is None' in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_number_that_the_loss_ignores_is_named(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "penstock.cli",
        "train",
        "dpo",
        str(write_task(tmp_path)),
        "--margin",
        "1.0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "margin has no effect on loss sigmoid" in done.stderr
