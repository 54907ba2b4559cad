"""Rows of a JSONL or Parquet file, each with a name for messages to people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from penstock.errors import ConfigError

Record = dict[str, Any]


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Yields (file and line, fields) of each row. Blank lines are passed over. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected JSONL or Parquet")
    found = False
    for where, record in _parquet(path) if path.suffix == ".parquet" else _jsonl(path):
        found = True
        yield where, record
    if not found:
        raise ConfigError(f"{path}: has no examples; expected one JSON object a line")


def _jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _parse(f"{path}, line {number}", line)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _parse(where: str, line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: is a JSON {type(record).__name__}; expected an object")
    return record


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}") from error
    for number, record in enumerate(rows, start=1):
        yield f"{path}, row {number}", record
