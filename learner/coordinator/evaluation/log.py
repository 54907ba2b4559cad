"""evaluations.jsonl: a line for each evaluation that has a result.

The ledger has them too, and is what holds: at a start the file is written anew from it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from learner.coordinator.evaluation.result import EvaluationResult

FILE_NAME = "evaluations.jsonl"

_log = logging.getLogger(__name__)


class EvaluationLog:
    """Written after the ledger, in the run's folder. A disk that refuses it costs the file, not the run."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME

    def restore(self, results: Iterable[str]) -> None:
        """results: lines as the ledger has them."""
        lines = "".join(f"{result}\n" for result in results)
        if not lines and not self._path.exists():
            return
        aside = self._path.with_suffix(".part")
        try:
            aside.write_text(lines, encoding="utf-8")
            aside.replace(self._path)
        except OSError as error:
            self._warn(error)

    def append(self, results: Iterable[EvaluationResult]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{result.to_json()}\n" for result in results)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        _log.warning("%s cannot be written: %s; the ledger has what belongs there", self._path, error)
