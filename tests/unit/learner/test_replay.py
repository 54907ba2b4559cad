"""The folder that a replay writes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.replay import _prepare
from penstock.errors import ConfigError


def test_an_earlier_replay_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "replay"
    _prepare(out, None)
    (out / "metrics.jsonl").touch()
    _prepare(out, None)
    assert not (out / "metrics.jsonl").exists()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty and not an earlier replay"):
        _prepare(tmp_path, None)


def test_a_file_is_no_folder_to_write_to(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.touch()
    with pytest.raises(ConfigError, match=r"taken cannot be written: .*choose another folder with --out"):
        _prepare(path, None)
