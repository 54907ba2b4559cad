"""Reading files and grading. The grading of a whole data set runs in tests/integration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from environments.question_answer import QuestionAnswer, is_correct, read_questions
from penstock.errors import ConfigError
from penstock.trajectory import Task

ROWS = [{"question": f"{a} + {b}?", "answer": f"Add.\n#### {a + b}"} for a in range(12) for b in range(12)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def environment(path: Path, **options: Any) -> QuestionAnswer:
    defaults = {
        "question_key": "question",
        "answer_key": "answer",
        "eval_fraction": 0.2,
        "eval_path": "",
        "prompt": "{question}",
    }
    return QuestionAnswer(path=str(path), **{**defaults, **options})


def questions(played: QuestionAnswer, split: str) -> list[str]:
    size = played.describe().splits.get(split, 0)
    return [played.prompt(Task("", split, index, 0))[0].content for index in range(size)]


def test_a_file_becomes_tasks_with_rewards(tmp_path: Path) -> None:
    played = environment(write(tmp_path / "sums.jsonl", ROWS))
    task = Task("question_answer:sums", "train", 0, 0)
    a, b = (int(number) for number in played.prompt(task)[0].content.rstrip("?").split(" + "))
    assert played.describe().name == "question_answer:sums"
    assert played.score(task, f"The answer is {a + b}.").reward.value == 1.0
    assert played.score(task, f"The answer is {a + b + 1}.").reward.value == 0.0


def test_no_question_is_in_both_splits(tmp_path: Path) -> None:
    played = environment(write(tmp_path / "sums.jsonl", ROWS + ROWS[:30]))
    train, held_out = questions(played, "train"), questions(played, "eval")
    assert sorted(train + held_out) == sorted(row["question"] for row in ROWS)
    assert held_out


def test_the_order_of_a_file_moves_no_question_to_the_other_split(tmp_path: Path) -> None:
    forwards = environment(write(tmp_path / "a.jsonl", ROWS))
    backwards = environment(write(tmp_path / "b.jsonl", ROWS[::-1]))
    assert set(questions(forwards, "eval")) == set(questions(backwards, "eval"))
    assert forwards.describe().digest != backwards.describe().digest


def test_questions_of_a_held_out_file_are_not_trained_on(tmp_path: Path) -> None:
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:20])
    played = environment(write(tmp_path / "all.jsonl", ROWS), eval_path=str(held_out))
    assert questions(played, "eval") == [row["question"] for row in ROWS[:20]]
    assert not set(questions(played, "eval")) & set(questions(played, "train"))


def test_other_keys_and_plain_numbers_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"q": "2+2\u2028?", "a": 4, "source": "me"}])
    (question,) = read_questions(path, "q", "a")
    assert (question.text, question.gold) == ("2+2\u2028?", "4")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: holds a list"),
        ('{"question": "?"}', "line 2: has no 'answer'"),
        ('{"answer": "1"}', "line 2: has no 'question'"),
        ('{"question": 3, "answer": "1"}', "line 2: 'question' is 3"),
        ('{"question": "?", "answer": null}', "line 2: 'answer' is None"),
        ('{"question": "?", "answer": true}', "line 2: 'answer' is True"),
        ('{"question": "?", "answer": "thinking\\n####"}', "line 2: .* has no final answer"),
        ("[" * 100_000, "line 2: is not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"broken.jsonl, {message}"):
        environment(path)


@pytest.mark.parametrize("contents", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_text_is_refused(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(contents)
    with pytest.raises(ConfigError, match=r"empty\.jsonl"):
        environment(path)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "18"),
        ("18", "#### 18"),
        ("18", "First 16, then 2.\n#### 18"),
        ("18", "The answer is $18."),
        ("18", r"so \boxed{18}"),
        ("18", "36/2"),
        ("18", "18.0"),
        ("1,234", "1234"),
        ("1234", "The answer is 1,234."),
        ("0.5", r"\boxed{\frac{1}{2}}"),
        (r"\frac{1}{2}", "0.5"),
        ("2x+1", r"\boxed{1+2x}"),
        ("-3", "The answer is -3."),
    ],
)
def test_equal_answers_are_correct(gold: str, answer: str) -> None:
    assert is_correct(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", ""),
        ("18", "eighteen, or so"),
        ("18", "17"),
        ("18", "-18"),
        ("18", "118"),
        ("18", "1.8"),
        ("18", r"\boxed{17} or \boxed{18}"),
        ("18", "#### 18 \n#### 17"),
        ("18", "nan"),
        ("18", "NaN inf"),
        ("18", r"\boxed{x}"),
        ("18", "[" * 3000),
        ("18", "1/0"),
        ("18", "\x00"),
    ],
)
def test_other_answers_are_wrong(gold: str, answer: str) -> None:
    assert not is_correct(gold, answer)
