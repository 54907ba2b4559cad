from __future__ import annotations

import sys
from types import ModuleType

import pytest

from environments.base import Form
from environments.loading import form_of, load
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


class Panel:
    def describe(self) -> None: ...
    def prompt(self, task: object) -> None: ...
    def score_batch(self, answers: object) -> None: ...


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
    games.__dict__.update(Game=Game, Quiz=Quiz, Panel=Panel, Half=Half, WrongStep=WrongStep, number=3)
    monkeypatch.setitem(sys.modules, "games", games)


def test_a_class_is_found_and_constructed_with_its_options() -> None:
    game = load("games:Game", {"size": 5})
    assert isinstance(game, Game)
    assert game.size == 5


@pytest.mark.parametrize(
    ("name", "form"),
    [("Game", Form.STEPPED), ("Quiz", Form.SINGLE_TURN), ("Panel", Form.BATCHED)],
)
def test_the_methods_tell_the_form(name: str, form: Form) -> None:
    assert form_of(load(f"games:{name}", {})) is form


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
