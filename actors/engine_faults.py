"""Tells an engine that stumbled from one that will not work again."""

from __future__ import annotations

_MOST = 8
"""Rollouts in a row that began after one had failed, and failed too."""


class EngineFaults:
    """Counts rollouts that the engine failed since the last one that it finished.

    Those that were running when the engine first failed do not count: one step that goes wrong may end them all.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._num_later = 0

    def finished(self) -> None:
        """A rollout came to its end."""
        self._since = None
        self._num_later = 0

    def failed(self, *, began: float, now: float) -> bool:
        """A rollout that began then ended now by the engine's fault. Whether the engine is to be given up."""
        if self._since is None:
            self._since = now
        elif began > self._since:
            self._num_later += 1
        return self._num_later >= _MOST
