import json
from pathlib import Path

import pytest

from learner.training.examples import load_tokenizer, read_examples
from penstock.errors import ConfigError
from tests.tiny_policy import EOS_ID, write_tiny_policy


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load_tokenizer(write_tiny_policy(tmp_path_factory.mktemp("policy")))


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_only_the_completion_and_its_end_are_learned_from(tmp_path: Path, tokenizer) -> None:
    path = write(tmp_path, json.dumps({"prompt": "4-1=", "completion": "3"}), "")
    (example,) = read_examples(path, tokenizer, max_tokens=100)
    assert tokenizer.decode(example.token_ids[:-1]) == "4-1=3"
    assert example.token_ids[-1] == EOS_ID
    assert example.loss_mask.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1", "compl', "is not JSON"),
        ('["1", "2"]', "is a JSON list; expected an object"),
        ('{"prompt": "1"}', '"completion" is None; expected a string'),
        ('{"prompt": 1, "completion": "2"}', '"prompt" is 1; expected a string'),
        ('{"prompt": "1111111", "completion": "2222"}', "has 12 tokens; the policy's context holds 10"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, tokenizer, line: str, message: str) -> None:
    path = write(tmp_path, '{"prompt": "1", "completion": "2"}', line)
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 2") as caught:
        read_examples(path, tokenizer, max_tokens=10)
    assert message in str(caught.value)


def test_a_file_that_is_missing_or_empty_is_named(tmp_path: Path, tokenizer) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_examples(tmp_path / "none.jsonl", tokenizer, max_tokens=10)
    with pytest.raises(ConfigError, match="has no examples"):
        read_examples(write(tmp_path, ""), tokenizer, max_tokens=10)
