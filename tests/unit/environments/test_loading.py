from __future__ import annotations

import sys
from types import ModuleType

import pytest

from environments.loading import is_single_turn, load
from penstock.errors import ConfigError


class Game:
    def __init__(self, *, size: int = 3) -> None:
        if size == 13:
            raise RuntimeError("unlucky")
        self.size = size

    def describe(self) -> None: ...
    def reset(self, task: object) -> None: ...
    def step(self, action: str) -> None: ...
    def close(self) -> None: ...


class Quiz:
    def describe(self) -> None: ...
    def prompt(self, task: object) -> None: ...
    def score(self, task: object, action: str) -> None: ...


class Half:
    def describe(self) -> None: ...
    def reset(self, task: object) -> None: ...
    def close(self) -> None: ...


class WrongStep(Game):
    def step(self) -> None:  # type: ignore[override]
        ...


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    games = ModuleType("games")
    games.__dict__.update(Game=Game, Quiz=Quiz, Half=Half, WrongStep=WrongStep, number=3)
    monkeypatch.setitem(sys.modules, "games", games)


def test_a_class_is_found_and_constructed_with_its_options() -> None:
    game = load("games:Game", {"size": 5})
    assert isinstance(game, Game)
    assert game.size == 5
    assert not is_single_turn(game)
    assert is_single_turn(load("games:Quiz", {}))


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("games", {}, "expected MODULE:CLASS"),
        ("no_such_module:Game", {}, "no module 'no_such_module'"),
        ("games:Gmae", {}, "has no class 'Gmae'"),
        ("games:number", {}, "has no class 'number'"),
        ("games:Game", {"sise": 5}, "cannot take the options"),
        ("games:Game", {"size": 13}, "RuntimeError: unlucky"),
        ("games:Half", {}, "has no method 'step'"),
        ("games:WrongStep", {}, "step cannot take 1 arguments"),
    ],
)
def test_what_does_not_fit_is_a_clear_error(target: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(target, options)
