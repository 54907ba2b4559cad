"""Seeds made of others."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """Mixes integers into a seed in [1, 2**63)."""
    state = np.random.SeedSequence([part & 0xFFFFFFFFFFFFFFFF for part in parts]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1)) | 1
