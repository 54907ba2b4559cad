"""From `module:Class` and options to an environment that keeps the protocol.

Runs in worker processes only: importing a module runs its code.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Mapping
from typing import Any

from environments.base import AnyEnvironment, Form
from penstock.errors import ConfigError, PenstockError

_SINGLE_TURN = {"describe": 0, "prompt": 1, "score": 2}
_BATCHED = {"describe": 0, "prompt": 1, "score_batch": 1}
_STEPPED = {"describe": 0, "reset": 1, "step": 1, "close": 0}


def load(target: str, options: Mapping[str, Any]) -> AnyEnvironment:
    """Imports and constructs. Raises ConfigError if the target is missing or does not fit."""
    factory = _find(target)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(f"{target} cannot take the options {sorted(options)}: {error}") from None
    try:
        environment = factory(**options)
    except PenstockError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise ConfigError(f"{target} cannot be constructed: {type(error).__name__}: {error}") from error
    _check_methods(target, environment)
    loaded: AnyEnvironment = environment
    return loaded


def form_of(environment: object) -> Form:
    if hasattr(environment, "score_batch"):
        return Form.BATCHED
    return Form.SINGLE_TURN if hasattr(environment, "score") else Form.STEPPED


def _find(target: str) -> Any:
    module_name, separator, class_name = target.partition(":")
    if not separator or not module_name or not class_name:
        raise ConfigError(f"{target!r} names no environment; expected MODULE:CLASS")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"no module {module_name!r}; expected one that can be imported from the current folder"
            ) from None
        traceback.print_exc()
        raise ConfigError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    factory = getattr(module, class_name, None)
    if not callable(factory):
        raise ConfigError(f"{module_name} has no class {class_name!r}")
    return factory


def _check_methods(target: str, environment: object) -> None:
    forms = {Form.STEPPED: _STEPPED, Form.SINGLE_TURN: _SINGLE_TURN, Form.BATCHED: _BATCHED}
    expected = forms[form_of(environment)]
    for name, num_arguments in expected.items():
        method = getattr(environment, name, None)
        if not callable(method):
            raise ConfigError(
                f"{target} has no method {name!r}; an environment has {', '.join(_STEPPED)} (or, for one turn "
                f"without memory, {', '.join(_SINGLE_TURN)}): see environments/base.py"
            )
        try:
            inspect.signature(method).bind(*range(num_arguments))
        except TypeError as error:
            raise ConfigError(f"{target}.{name} cannot take {num_arguments} arguments: {error}") from None
