"""What an actor sent and what it heard back, as lines of JSON that survive SIGKILL.

    {"op": "invoke", "session": S, "first": 7, "ids": ["0a...", ""]}       about to be sent
    {"op": "ok", "session": S, "acknowledged": 8, "verdicts": [[7, "accepted", ""], ...]}
    {"op": "fail", "session": S, "reason": "..."}                          refused for good
    {"op": "unknown", "session": S, "reason": "..."}                       the stream broke

`ids` are trajectories, "" for a release, numbered from `first`. A line of `invoke` is
written before its bytes leave, and one of `ok` before the actor forgets what it
acknowledges: so every acknowledgement that was acted upon is on record. What was invoked
in a session and not acknowledged there is unknown: it may or may not be on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError, PenstockError
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1.trajectory_pb2 import Trajectory


class History:
    """Appends to a file. Unbuffered: what the process did before it was killed is there."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"history {path} cannot be written: {error}") from error

    def invoke(self, session_id: str, items: Sequence[pb.SubmitItem]) -> None:
        ids = [Trajectory.FromString(item.trajectory).trajectory_id for item in items]
        self._write({"op": "invoke", "session": session_id, "first": items[0].sequence, "ids": ids})

    def ok(self, session_id: str, response: pb.SubmitResponse) -> None:
        verdicts = [[verdict.sequence, _kind(verdict), _code(verdict)] for verdict in response.verdicts]
        line = {"op": "ok", "session": session_id, "acknowledged": response.acknowledged}
        self._write({**line, "verdicts": verdicts})

    def fail(self, session_id: str, reason: str) -> None:
        self._write({"op": "fail", "session": session_id, "reason": reason})

    def unknown(self, session_id: str, reason: str) -> None:
        self._write({"op": "unknown", "session": session_id, "reason": reason})

    def close(self) -> None:
        os.close(self._file)

    def _write(self, line: dict[str, object]) -> None:
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a history; a last one that was cut short is left out. Raises PenstockError."""
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise PenstockError(f"{path}, line {number}: is not JSON: {error}") from error


def _kind(verdict: pb.Verdict) -> str:
    return pb.VerdictKind.Name(verdict.kind).removeprefix("VERDICT_KIND_").lower()


def _code(verdict: pb.Verdict) -> str:
    if verdict.code == pb.REJECTION_CODE_UNSPECIFIED:
        return ""
    return pb.RejectionCode.Name(verdict.code).removeprefix("REJECTION_CODE_").lower()
