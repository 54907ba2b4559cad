import json
from pathlib import Path

from penstock.quickstart.task import CHARACTERS, write_demonstrations


def test_four_in_ten_demonstrations_are_right_and_the_others_copy_the_word(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.jsonl"

    write_demonstrations(path, ["hello=", "world="], count=2000, seed=0)

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2000
    assert {(line["prompt"], line["completion"]) for line in lines} == {
        ("hello=", "olleh"), ("hello=", "hello"), ("world=", "dlrow"), ("world=", "world"),
    }  # fmt: skip
    right = sum(line["completion"][::-1] + "=" == line["prompt"] for line in lines) / 2000
    assert 0.36 < right < 0.44


def test_equal_seeds_give_equal_demonstrations(tmp_path: Path) -> None:
    texts = []
    for seed in (1, 1, 2):
        write_demonstrations(tmp_path / "d", ["hello=", "world="], count=50, seed=seed)
        texts.append((tmp_path / "d").read_text())

    assert texts[0] == texts[1] != texts[2]


def test_the_alphabet_holds_what_prompts_are_made_of() -> None:
    assert set("Hello=") <= set(CHARACTERS)
