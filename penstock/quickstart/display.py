"""What the quickstart says on the terminal: a line a stage, and the run's live view."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from penstock.cli.view import RewardHistory, line, render
from penstock.v1 import operator_pb2 as pb

Show = Callable[[pb.GetStatusResponse], None]

_LINE_SECONDS = 2.0


class Display:
    """plain: lines only, for logs and pipes."""

    def __init__(self, console: Console, *, plain: bool) -> None:
        self._console = console
        self._plain = plain
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        self._console.print(Text.assemble((f"{self.seconds:6.1f} s  ", "dim"), text), soft_wrap=True)

    def add(self, text: str) -> None:
        """A line without a time."""
        self._console.print(Text(text), soft_wrap=True)

    @contextlib.contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Says what goes on; in a terminal, with a spinner that leaves no trace."""
        if self._plain:
            self.say(f"{text} ...")
            yield
        else:
            with self._console.status(Text(text)):
                yield

    @contextlib.contextmanager
    def watching(self) -> Iterator[Show]:
        """Yields what shows a status: redraws the view, or prints a line now and then."""
        if self._plain:
            yield _Lines(self.say)
            return
        rewards = RewardHistory()
        with Live(console=self._console, auto_refresh=False) as live:

            def show(status: pb.GetStatusResponse) -> None:
                rewards.add(status)
                live.update(render(status, rewards), refresh=True)

            yield show


class _Lines:
    """A line for a new version, at most every two seconds, and one for the end."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said_at = float("-inf")
        self._step = -1

    def __call__(self, status: pb.GetStatusResponse) -> None:
        now = time.monotonic()
        is_last = status.state == pb.RUN_STATE_FINISHED
        if status.version.step != self._step and (is_last or now - self._said_at >= _LINE_SECONDS):
            self._step, self._said_at = status.version.step, now
            self._say(line(status))
