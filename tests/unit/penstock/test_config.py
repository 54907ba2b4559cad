"""Settings as they are written on a command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from penstock import config
from penstock.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    compile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    insecure: bool = False
    keep_best: int = 0
    name: str = ""
    seeds: tuple[int, ...] = ()
    training: Inner = field(default_factory=Inner)


def parse(*flags: str) -> Settings:
    return config.load(Settings, list(flags), prog="test", description="")


@pytest.mark.parametrize("value", [(), ("true",), ("True",)])
def test_a_switch_stands_alone_or_is_written_as_in_toml_or_in_python(value: tuple[str, ...]) -> None:
    assert parse("--insecure", *value, "--keep-best", "2") == Settings(insecure=True, keep_best=2)
    assert parse("--keep-best", "2", "--insecure", *value) == Settings(insecure=True, keep_best=2)
    assert parse("--training.compile", *value).training.compile


@pytest.mark.parametrize("value", ["false", "False"])
def test_a_switch_is_turned_off(value: str) -> None:
    assert not parse("--insecure", value).insecure


def test_what_is_no_switch_keeps_its_value_and_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--name", "true").name == "true"
    with pytest.raises(SystemExit):
        parse("--keep-best")
    assert "keep-best" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("training = 3", r"training is 3; expected a table: \[training\]"),
        ("training = [1, 2]", r"training is \[1, 2\]; expected a table"),
        ("[name]\nfirst = 1", "name is a table, of first; expected a value"),
        ("[seeds]", "seeds is a table, of nothing; expected a value"),
        ("keep_best = [1, 2]", "keep_best is a list of 2; expected one value"),
        ("[training]\ncompile = [true]", "training.compile is a list of 1; expected one value"),
    ],
)
def test_values_lists_and_tables_in_each_others_places_are_named(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        parse(str(path))


def test_values_lists_and_tables_in_their_places_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("keep-best = 2\nseeds = [3, 4]\n[training]\ncompile = true\n")
    assert parse(str(path)) == Settings(keep_best=2, seeds=(3, 4), training=Inner(compile=True))
