"""What the environments of a run said of themselves, in its folder: a coordinator that starts again needs no answer."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from environments.base import Description

FILE_NAME = "environments.json"

_log = logging.getLogger(__name__)


def load(folder: Path) -> dict[str, Description]:
    """By address; those that can be read."""
    path = folder / FILE_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {address: Description(**fields) for address, fields in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("%s cannot be read: %s; every environment must answer", path, error)
        return {}


def save(folder: Path, described: Mapping[str, Description]) -> None:
    """A disk that refuses it costs the file, not the run."""
    path = folder / FILE_NAME
    aside = path.with_suffix(".part")
    fields = {address: dataclasses.asdict(description) for address, description in described.items()}
    try:
        aside.write_text(json.dumps(fields, indent=2), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        _log.warning("%s cannot be written: %s", path, error)
