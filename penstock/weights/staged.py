"""A version that has arrived whole and is verified, waiting to be installed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.weights.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedWeights:
    manifest: Manifest
    buffer: NDArray[np.uint8]
    """[num_bytes] uint8: the packed tensors, at the manifest's offsets. Every chunk's digest was checked."""
