"""Loops that numba compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first call; kept for the next process, where numba finds a folder to write to."""
    try:
        return njit(cache=True, nogil=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # an installation that is read-only, and a user without a home
        return njit(nogil=True)(function)  # type: ignore[no-any-return]
