"""Configuration: frozen dataclasses, a TOML file, and flags, in one parser.

A TOML file's values are put before the user's flags, so that tyro checks both the
same way: unknown keys (the nearest one is named), wrong types, missing values.
Ranges are checked by each dataclass's `__post_init__`, which raises ConfigError.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import tyro

from penstock.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def load(config_type: type[ConfigT], argv: Sequence[str], *, prog: str, description: str) -> ConfigT:
    """Parses `[RUN.toml] [--flag value ...]`.

    The first argument is a TOML file if it doesn't begin with a dash. Exits with
    status 2 after a message for anything that does not parse; raises ConfigError for
    a file that is missing or is not TOML, and for values out of range.
    """
    file_flags: list[str] = []
    flags = list(argv)
    if flags and not flags[0].startswith("-"):
        path = Path(flags.pop(0))
        table = _read_toml(path)
        _check_shape(config_type, table, path)
        file_flags = list(_flags_of(table))
        prog = f"{prog} {path}"
    return tyro.cli(
        config_type,
        args=[*file_flags, *with_switches(config_type, flags)],
        prog=prog,
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.EnumChoicesFromValues),
    )


def with_switches(config_type: type, argv: Sequence[str]) -> list[str]:
    """The same flags, where a switch may stand alone (`--insecure`) and be written as in TOML (`--insecure true`)."""
    switches = set(_switches(config_type))
    args: list[str] = []
    for arg in argv:
        previous = args[-1] if args else ""
        if _name_of(previous) in switches:
            if arg in ("true", "false"):
                args.append(arg.capitalize())
                continue
            if arg not in ("True", "False"):
                args.append("True")
        args.append(arg)
    if args and _name_of(args[-1]) in switches:
        args.append("True")
    return args


def _name_of(arg: str) -> str:
    """A flag's dotted name; empty if it is none, or has its value with it."""
    return arg[2:].replace("-", "_") if arg.startswith("--") else ""


def _switches(config_type: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of fields that are on or off."""
    for name, hint in get_type_hints(config_type).items():
        if hint is bool:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _switches(hint, f"{prefix}{name}.")


def to_toml(config: object) -> str:
    """Writes a resolved configuration as the TOML that `load` reads."""
    scalars, tables = [], []
    for name, value in _public_fields(config):
        if dataclasses.is_dataclass(value):
            body = to_toml(value).replace("\n[", f"\n[{name}.")
            if body.startswith("["):
                body = f"[{name}." + body[1:]
            tables.append(f"\n[{name}]\n{body}")
        elif value is not None:
            scalars.append(f"{name} = {_toml_value(value)}\n")
    return "".join(scalars + tables)


def _public_fields(config: object) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        yield field.name, getattr(config, field.name)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a TOML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def _check_shape(config_type: type, table: dict[str, Any], path: Path, prefix: str = "") -> None:
    """Refuses tables, lists and single values in each other's places. What has no such name is left to tyro."""
    hints = get_type_hints(config_type)
    for key, value in table.items():
        hint = hints.get(key.replace("-", "_"))
        if hint is None:
            continue
        name = f"{prefix}{key}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{path}: {name} is {value!r}; expected a table: [{name}], and its keys below"
                )
            _check_shape(hint, value, path, f"{name}.")
        elif isinstance(value, dict):
            raise ConfigError(
                f"{path}: {name} is a table, of {', '.join(value) or 'nothing'}; expected a value"
            )
        elif isinstance(value, list) and get_origin(hint) is not tuple:
            raise ConfigError(f"{path}: {name} is a list of {len(value)}; expected one value")


def _flags_of(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flags_of(value, f"{name}.")
        elif isinstance(value, list):
            yield f"--{name}"
            yield from (str(item) for item in value)
        else:
            yield f"--{name}"
            yield str(value)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return _toml_value(value.value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
