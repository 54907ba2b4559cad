import json
from pathlib import Path

import pytest

from learner.training.examples import load_tokenizer, read_examples, read_pairs
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
        (
            '{"prompt": "1111111", "completion": "2222"}',
            "has 12 tokens; the policy's context has room for 10",
        ),
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


CHAT = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "+2="},
    {"role": "assistant", "content": "4"},
]


def learned(tokenizer, sequence) -> list[str]:
    """Each run of tokens that is learned from."""
    ids, mask = sequence.token_ids, sequence.loss_mask
    text = "".join(tokenizer.decode([i]) if m else " " for i, m in zip(ids, mask, strict=True))
    return text.split()


def test_every_turn_of_the_assistant_is_learned_with_its_end(tmp_path: Path, tokenizer) -> None:
    (example,) = read_examples(write(tmp_path, json.dumps({"messages": CHAT})), tokenizer, max_tokens=100)
    assert learned(tokenizer, example) == ["2<eos>", "4<eos>"]


def test_of_a_chat_prompt_and_completion_only_the_completion_is_learned(tmp_path: Path, tokenizer) -> None:
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    (example,) = read_examples(write(tmp_path, json.dumps(row)), tokenizer, max_tokens=100)
    assert learned(tokenizer, example) == ["4<eos>"]
    assert tokenizer.decode(example.token_ids) == "1+1=2+2=4<eos>"


def test_a_template_s_own_marks_are_not_learned(tmp_path: Path, tokenizer) -> None:
    marked = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    usual, tokenizer.chat_template = tokenizer.chat_template, marked
    try:
        (example,) = read_examples(write(tmp_path, json.dumps({"messages": CHAT})), tokenizer, max_tokens=100)
    finally:
        tokenizer.chat_template = usual
    assert tokenizer.decode(example.token_ids) == "u:1+1=<eos>\na:2<eos>\nu:+2=<eos>\na:4<eos>"
    assert learned(tokenizer, example) == ["2<eos>", "4<eos>"]


def test_pairs_are_read_from_text_chats_and_parquet(tmp_path: Path, tokenizer) -> None:
    text = {"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": 0.5}
    chat = {"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": [{"role": "assistant", "content": "3"}]}
    implicit = {"chosen": CHAT[:2], "rejected": [CHAT[0], {"role": "assistant", "content": "3"}]}
    path = write(tmp_path, *(json.dumps(row) for row in (text, chat, implicit)))
    for pair in read_pairs(path, tokenizer, max_tokens=100):
        assert tokenizer.decode(pair.chosen.token_ids) == "1+1=2<eos>"
        assert learned(tokenizer, pair.chosen) == ["2<eos>"]
        assert learned(tokenizer, pair.rejected) == ["3<eos>"]
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([text, text]), tmp_path / "data.parquet")
    pairs = read_pairs(tmp_path / "data.parquet", tokenizer, max_tokens=100)
    assert [pair.margin for pair in pairs] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1", "chosen": "2"}, '"rejected" is None; expected a string'),
        ({"prompt": "1", "chosen": "2", "rejected": "2"}, "chosen and rejected are the same"),
        ({"prompt": "1", "chosen": "2", "rejected": "3", "margin": "x"}, "\"margin\" is 'x'"),
        ({"prompt": CHAT[:1], "chosen": "2", "rejected": "3"}, "expected messages, as prompt is"),
        ({"chosen": CHAT[:2], "rejected": CHAT[:2]}, "begin with no common prompt"),
        ({"prompt": CHAT[:1], "chosen": CHAT[:1], "rejected": CHAT[1:2]}, "ends with role 'user'"),
        (
            {"prompt": [{"role": "user"}], "chosen": CHAT[1:2], "rejected": CHAT[3:]},
            "expected a role and a content",
        ),
    ],
)
def test_a_broken_pair_is_named(tmp_path: Path, tokenizer, row: dict[str, object], message: str) -> None:
    good = json.dumps({"prompt": "1", "chosen": "2", "rejected": "3"})
    with pytest.raises(ConfigError, match=r"data\.jsonl, line 2") as caught:
        read_pairs(write(tmp_path, good, json.dumps(row)), tokenizer, max_tokens=100)
    assert message in str(caught.value)


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "data.parquet").write_text("{}")
    with pytest.raises(ConfigError, match=r"data\.parquet: cannot be read as Parquet"):
        read_pairs(tmp_path / "data.parquet", tokenizer, max_tokens=100)
