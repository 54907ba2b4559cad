"""From adapters to a published version: the base is gathered once, and after that the adapters alone."""

from __future__ import annotations

import numpy as np
import torch

from learner.training.adapters import Adapters, parts_of
from learner.training.config import Precision
from learner.training.parallel import Ranks, whole
from learner.training.policy import Policy
from learner.training.publish import published_tensors, refuse_non_finite, to_host, trained_tensors
from penstock.trajectory import PolicyVersion
from penstock.weights.adapted_log import AdaptedLog
from penstock.weights.adapters import LowRank
from penstock.weights.manifest import Factor, Manifest


class AdapterPublisher:
    """Writes versions of a policy with adapters. The base is in the precision that it computes in."""

    def __init__(self, policy: Policy, ranks: Ranks, log: AdaptedLog | None, precision: Precision) -> None:
        """log: on rank 0, which makes the versions."""
        assert policy.adapters is not None
        self._policy = policy
        self._adapters: Adapters = policy.adapters
        self._ranks = ranks
        self._log = log
        self._dtype = torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32
        self._has_base = False
        self.deltas_wanted = False
        """Makes no difference: the adapters, which are small, come with every version."""

    def write(self, version: PolicyVersion) -> Manifest | None:
        """Every rank calls it; rank 0 gets the manifest. Raises PenstockError for weights that are not finite."""
        if not self._has_base:
            refuse_non_finite(version, published_tensors(self._policy), self._ranks)
            self._write_base(version)
            self._has_base = True
        refuse_non_finite(version, trained_tensors(self._policy), self._ranks)
        gathered = {name: whole(tensor) for name, tensor in trained_tensors(self._policy)}
        if self._log is None:
            return None
        parts = parts_of(gathered.items())
        return self._log.write(
            version,
            [
                LowRank(
                    factor=Factor(tensor=name, rank=self._adapters.rank, scale=self._adapters.scale),
                    b=_as_floats(b),
                    a=_as_floats(parts.a[name]),
                )
                for name, b in parts.b.items()
            ],
        )

    def _write_base(self, version: PolicyVersion) -> None:
        base = parts_of(published_tensors(self._policy)).base
        tensors = []
        for name, tensor in base.items():
            full = whole(tensor.to(self._dtype))
            if self._log is not None:
                tensors.append(to_host(name, full))
        if self._log is not None:
            self._log.write_base(version, tensors)


def _as_floats(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()
