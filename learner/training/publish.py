"""From sharded parameters to a published version, in the names of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from learner.training.adapters import merged, parts_of
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


class Publishes(Protocol):
    """What makes versions of a policy."""

    deltas_wanted: bool
    """Whether actors on other hosts want deltas, as rank 0 was told."""

    def write(self, version: PolicyVersion) -> Manifest | None:
        """Every rank calls it; rank 0 gets the manifest. Raises PenstockError for weights that are not finite."""
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
        names = None if self._policy.stage is None else list(self._policy.stage.owners)
        refuse_non_finite(version, published_tensors(self._policy), self._ranks, names=names)
        wanted = bool(self._ranks.maximum(torch.tensor([int(self.deltas_wanted)])))
        if wanted and self._shards.is_ready:
            delta = self._shards.gather(self._tensors(), _DTYPES[self._dtype])
            return self._sink.write_delta(version, delta) if self._sink is not None else None
        tensors = []
        for name, full in gathered(self._policy, self._tensors()):
            if self._sink is not None:
                tensors.append(to_host(name, full))
        if wanted:
            self._shards.remember(self._tensors(), _DTYPES[self._dtype])
        else:
            self._shards.forget()
        return self._sink.write(version, tensors, with_delta=wanted) if self._sink is not None else None

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """In the precision that is published."""
        for name, tensor in published_tensors(self._policy):
            yield name, tensor.to(self._dtype)


def refuse_non_finite(
    version: PolicyVersion,
    named: Iterable[tuple[str, torch.Tensor]],
    ranks: Ranks,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Raises PenstockError, on every rank, if any rank's part of a tensor is not finite.

    names: of the tensors of all ranks, where not every rank has a part of each.
    """
    own = {name: torch.isfinite(local(tensor)).all() for name, tensor in named}
    names = list(own) if names is None else names
    fine = torch.ones((), dtype=torch.bool, device=ranks.device)
    finite = torch.stack([own.get(name, fine) for name in names]).to(torch.int64).cpu()
    bad = ranks.maximum(1 - finite).tolist()
    found = [name for name, is_bad in zip(names, bad, strict=True) if is_bad]
    if found:
        raise PenstockError(
            f"version {version} is not published: {len(found)} tensors are not finite, such as {found[0]}; "
            "start again to go on from the newest checkpoint, with a lower learning rate"
        )


def published_tensors(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and persistent buffers of floats, under the names that the model has for them; tied ones once,
    under the first."""
    yield from named_tensors(policy.causal_lm)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """published_tensors of a model that is no Policy (yet)."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point():
            yield name, buffer.detach()


def trained_tensors(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint needs beside the policy folder: all that is published, or the adapters alone."""
    if policy.adapters is None:
        yield from published_tensors(policy)
        return
    for name, parameter in policy.causal_lm.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()


def gathered(policy: Policy, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors; rank 0 gets those of all stages. A collective.

    named: of the policy, those of this rank's stage.
    """
    if policy.stage is not None:
        yield from policy.stage.collect(dict(named))
        return
    for name, tensor in named:
        yield name, whole(tensor)


def full_tensors(policy: Policy, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The whole policy with its adapters merged, by the model's own names. A collective: only rank 0's is whole."""
    full = gathered(policy, published_tensors(policy))
    tensors = {name: tensor.cpu() for name, tensor in full if ranks.is_first}
    if policy.adapters is None or not ranks.is_first:
        return tensors
    parts = parts_of(tensors.items())
    return merged(parts.base, parts, policy.adapters.scale)


def to_host(name: str, tensor: torch.Tensor) -> HostTensor:
    host = tensor.cpu().contiguous()
    return HostTensor(
        name=name,
        dtype=_DTYPES[host.dtype],
        shape=tuple(host.shape),
        data=host.reshape(-1).view(torch.uint8).numpy(),
    )
