"""From sharded parameters to a published version, in the names of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from learner.training.config import Precision
from learner.training.parallel import Ranks, local, whole
from learner.training.policy import Policy
from learner.training.shards import ShardDeltas
from penstock.errors import PenstockError
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import HostTensor, Manifest

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class WeightSink(Protocol):
    """Where versions go: penstock.weights.version_log.VersionLog, or a test's list."""

    def write(
        self, version: PolicyVersion, tensors: Sequence[HostTensor], *, with_delta: bool = False
    ) -> Manifest: ...

    def write_delta(self, version: PolicyVersion, delta: NDArray[np.uint8]) -> Manifest:
        """The version that a delta makes of the one written last."""
        ...


class Publisher:
    """Gathers the policy and writes it to a sink, in the precision that it computes in.

    Once deltas are wanted, ranks send what changed in their shards instead of the shards.
    """

    def __init__(self, policy: Policy, ranks: Ranks, sink: WeightSink | None, precision: Precision) -> None:
        self._policy = policy
        self._ranks = ranks
        self._sink = sink
        self._dtype = torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32
        self._shards = ShardDeltas(ranks)
        self.deltas_wanted = False
        """Whether actors on other hosts want deltas, as rank 0 was told."""

    def write(self, version: PolicyVersion) -> Manifest | None:
        """Every rank calls it; rank 0, which has the sink, gets the manifest.

        Raises PenstockError for weights that are not finite.
        """
        self._refuse_non_finite(version)
        wanted = bool(self._ranks.maximum(torch.tensor([int(self.deltas_wanted)])))
        if wanted and self._shards.is_ready:
            delta = self._shards.gather(self._tensors(), _DTYPES[self._dtype])
            return self._sink.write_delta(version, delta) if self._sink is not None else None
        tensors = []
        for name, tensor in self._tensors():
            full = whole(tensor)
            if self._sink is not None:
                tensors.append(_to_host(name, full))
        if wanted:
            self._shards.remember(self._tensors(), _DTYPES[self._dtype])
        else:
            self._shards.forget()
        return self._sink.write(version, tensors, with_delta=wanted) if self._sink is not None else None

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """In the precision that is published."""
        for name, tensor in published_tensors(self._policy):
            yield name, tensor.to(self._dtype)

    def _refuse_non_finite(self, version: PolicyVersion) -> None:
        tensors = [(name, local(tensor)) for name, tensor in published_tensors(self._policy)]
        finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in tensors]).to(torch.int64).cpu()
        bad = self._ranks.maximum(1 - finite).tolist()
        names = [name for (name, _), is_bad in zip(tensors, bad, strict=True) if is_bad]
        if names:
            raise PenstockError(
                f"version {version} is not published: {len(names)} tensors are not finite, such as {names[0]}; "
                "start again to go on from the newest checkpoint, with a lower learning rate"
            )


def published_tensors(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and persistent buffers of floats, under the model's own names; tied ones once, under the first."""
    model = policy.causal_lm
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point():
            yield name, buffer.detach()


def _to_host(name: str, tensor: torch.Tensor) -> HostTensor:
    host = tensor.cpu().contiguous()
    return HostTensor(
        name=name,
        dtype=_DTYPES[host.dtype],
        shape=tuple(host.shape),
        data=host.reshape(-1).view(torch.uint8).numpy(),
    )
