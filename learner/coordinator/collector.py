"""When the coordinator's process looks for garbage in cycles: rarely.

It holds millions of small values, and makes hundreds of thousands a second that go by their
counts alone: looking through them took 6 % of the time of taking trajectories in.
"""

from __future__ import annotations

import gc

_YOUNG, _MIDDLE, _OLD = 10_000, 20, 50
"""New values until the young are looked through, and how often that is until older ones are too."""


def collect_rarely() -> None:
    """Leaves out for good what exists by now. Call once the program is set up."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
