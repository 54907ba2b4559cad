"""`penstock train sft` and what it leaves behind, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.offline.main import main
from penstock.errors import ConfigError
from tests.tiny_policy import write_tiny_policy

CONFIG = """
policy = "{folder}/policy"
data = "{folder}/data.jsonl"
out = "{folder}/out"
num_steps = 60
batch_sequences = 16
device = "cpu"
[optimizer]
learning_rate = 1e-2
"""


def write_task(tmp_path: Path) -> Path:
    """Ten pairs to learn by heart: a digit, and the letter that goes with it."""
    write_tiny_policy(tmp_path / "policy")
    pairs = [{"prompt": f"{digit}=", "completion": chr(ord("a") + digit)} for digit in range(10)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "run.toml"


def answer(folder: Path, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = policy.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=4, do_sample=False
    )
    return str(tokenizer.decode(output[0, prompt_ids.shape[1] :], skip_special_tokens=True))


def test_a_mapping_is_learned_and_transformers_loads_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", str(write_task(tmp_path))]) == 0
    printed = re.search(r"final loss ([\d.]+); policy written to", capsys.readouterr().out.replace("\n", " "))
    assert printed is not None
    assert float(printed[1]) < 0.05
    assert [answer(tmp_path / "out", f"{digit}=") for digit in range(10)] == list("abcdefghij")


@pytest.mark.slow
def test_two_ranks_learn_the_same(tmp_path: Path) -> None:
    few = ["sft", str(write_task(tmp_path)), "--num-steps", "8"]
    assert main([*few, "--out", str(tmp_path / "one")]) == 0
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "penstock.cli",
            "train",
            *few,
            "--num-ranks",
            "2",
            "--out",
            str(tmp_path / "two"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)


def test_a_broken_line_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    config = write_task(tmp_path)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('\n{"prompt": "1=", "completi')
    command = [sys.executable, "-m", "penstock.cli", "train", "sft", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.search(r"data\.jsonl, line 11: is not JSON", done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_kind_of_training_is_named() -> None:
    with pytest.raises(ConfigError, match="got rl; expected `penstock train sft\\|dpo\\|rm"):
        main(["rl"])
