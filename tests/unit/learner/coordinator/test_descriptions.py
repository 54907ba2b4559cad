"""What environments said of themselves is there when a coordinator starts again."""

from __future__ import annotations

from pathlib import Path

import pytest

from environments.base import Description
from learner.coordinator import descriptions

LETTERS = Description(name="letters", version="1", digest="ab", splits={"train": 0, "eval": 8}, max_turns=3)


def test_what_is_saved_is_loaded(tmp_path: Path):
    assert descriptions.load(tmp_path) == {}
    descriptions.save(tmp_path, {"localhost:1": LETTERS})
    assert descriptions.load(tmp_path) == {"localhost:1": LETTERS}


@pytest.mark.parametrize("text", ["", "[]", '{"localhost:1": {"name": "letters"}}', '{"localhost:1": 3}'])
def test_a_file_that_cannot_be_read_tells_nothing(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
):
    (tmp_path / descriptions.FILE_NAME).write_text(text)
    assert descriptions.load(tmp_path) == {}
    assert "every environment must answer" in caplog.text


def test_a_folder_that_cannot_be_written_costs_the_file_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    descriptions.save(tmp_path / "absent", {"localhost:1": LETTERS})
    assert "cannot be written" in caplog.text
