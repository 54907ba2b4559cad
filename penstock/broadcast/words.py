"""What a member's process is told, and what it tells: lines of JSON on its standard streams. Imports no torch.

sender                                         receiver
  Settings                  ->                   Settings, with everything about its group
                            <-  LISTENING
  Formation                 ->
                            <-  FORMED         <-  FORMED
  Sending                   ->
                            <-  MOVED ...      <-  BEGAN, once a version
                            <-  SENT
                            <-  FAILED         <-  FAILED     it ends soon after
                            <-  SILENT, by whose fault
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from penstock.trajectory import PolicyVersion


class Backend(StrEnum):
    GLOO = "gloo"
    """Host memory, over TCP."""
    NCCL = "nccl"
    """Device memory: NVLink, InfiniBand, or TCP."""


class Reason(StrEnum):
    """Why a group's members pull instead."""

    FORMING = "forming"
    """Not all members came together in time."""
    TIMEOUT = "timeout"
    """A piece did not move in time."""
    LOST = "lost"
    """A member's process ended or fell silent."""
    OVERWRITTEN = "overwritten"
    """The trainer wrote a newer version over the one that was being sent."""
    SENDER = "sender"
    """The sending process ended, or did not answer in time."""


class EventKind(StrEnum):
    LISTENING = "listening"
    FORMED = "formed"
    BEGAN = "began"
    MOVED = "moved"
    SENT = "sent"
    FAILED = "failed"
    SILENT = "silent"
    ENDED = "ended"
    """The process is gone. Told by who started it."""


class _Line:
    """A dataclass as a line of JSON. What comes from our own child is trusted to have its fields."""

    __slots__ = ()

    def to_line(self) -> str:
        return json.dumps(dataclasses.asdict(self))  # type: ignore[call-overload]

    @classmethod
    def from_line(cls, line: str) -> Self:
        return cls(**_tuples(json.loads(line)))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(_Line):
    """What a member's process starts with."""

    host: str
    """The sender's: of the address that it listens on; of the one that receivers reach it by."""
    device: str
    """"cpu", "cuda", "cuda:1", or "auto": cuda if there is one."""
    timeout_seconds: float
    """A piece that takes longer ends the group."""
    forming_seconds: float
    """So does a group that takes longer to come together."""
    piece_bytes: int
    port: int = 0
    """The sender's store; 0 in the sender itself, which takes a free one."""
    group: str = ""
    rank: int = 0
    """0 sends."""
    size: int = 0
    backend: str = ""
    segment_prefix: str = ""
    """Of the receiver's segment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Formation(_Line):
    """Tells a sender for whom it is."""

    group: str
    size: int
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending(_Line):
    """Has a sender broadcast a version of the trainer's segment. Also the header that receivers read."""

    epoch: int
    step: int
    digest: str
    num_bytes: int
    segment: str = ""
    nonce: str = ""

    @property
    def version(self) -> PolicyVersion:
        return PolicyVersion(self.epoch, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(_Line):
    kind: str
    port: int = 0
    """LISTENING"""
    device: str = ""
    """LISTENING: "cpu" or "cuda"."""
    epoch: int = 0
    step: int = 0
    digest: str = ""
    """BEGAN, SENT: the version's."""
    segment: str = ""
    """BEGAN: where the version arrives, on the receiver's host."""
    nonce: str = ""
    num_bytes: int = 0
    """MOVED: so far. SENT: all."""
    seconds: float = 0.0
    """SENT"""
    is_whole: bool = True
    """SENT: whether the segment still held the version at the end."""
    reason: str = ""
    """FAILED"""
    message: str = ""
    """FAILED"""
    ranks: tuple[int, ...] = ()
    """SILENT: the members at fault."""

    @property
    def version(self) -> PolicyVersion:
        return PolicyVersion(self.epoch, self.step)
