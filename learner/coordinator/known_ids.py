"""Which trajectory ids a run has stored: every one of them, in about eight bytes each.

An id that comes a second time is a duplicate, whichever lease it comes under: an actor that
numbers its trajectories from the start again must not end the coordinator.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from xxhash import xxh3_64_intdigest

_MERGE_AT = 65_536


class KnownIds:
    """A set of ids, by 64 bits of a hash.

    Of ten million ids any two share those with probability 3e-6; the later one would be
    taken for a duplicate and its slot be leased again.
    """

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, trajectory_id: str) -> bool:
        key = _key(trajectory_id)
        if key in self._recent:
            return True
        if not len(self._sorted):
            return False
        place = int(self._sorted.searchsorted(np.uint64(key)))
        return place < len(self._sorted) and int(self._sorted[place]) == key

    def add(self, trajectory_id: str) -> None:
        self._recent.add(_key(trajectory_id))
        if len(self._recent) >= _MERGE_AT:
            self._merge()

    def update(self, trajectory_ids: Iterable[str]) -> None:
        for trajectory_id in trajectory_ids:
            self.add(trajectory_id)

    def _merge(self) -> None:
        recent = np.sort(np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent)))
        places = self._sorted.searchsorted(recent)
        # Inserted, not sorted together: the event loop waits, and of ten million ids a sort takes most of a second.
        is_new = np.ones(len(recent), dtype=bool)
        inside = places < len(self._sorted)
        is_new[inside] = self._sorted[places[inside]] != recent[inside]
        self._sorted = np.insert(self._sorted, places[is_new], recent[is_new])
        self._recent.clear()


def _key(trajectory_id: str) -> int:
    return xxh3_64_intdigest(trajectory_id.encode())
