"""Settings as they are written on a command line."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from penstock import config


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    compile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    insecure: bool = False
    keep_best: int = 0
    name: str = ""
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
