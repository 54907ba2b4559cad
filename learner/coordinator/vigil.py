"""Notices when the learner waits and nothing comes."""

from __future__ import annotations


class Vigil:
    """One event for each time that nothing moves for `seconds`."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._num_moves = -1
        self._moved_at = 0.0
        self._told = False

    def is_news(self, *, waiting: bool, num_moves: int, now: float) -> bool:
        """waiting: whether somebody waits. num_moves: grows with all that could end the wait."""
        if num_moves != self._num_moves or not waiting:
            self._num_moves, self._moved_at, self._told = num_moves, now, False
        news = not self._told and now - self._moved_at >= self._seconds
        self._told = self._told or news
        return news
