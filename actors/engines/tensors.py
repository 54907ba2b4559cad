"""From a staged version's bytes to a model's tensors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penstock.errors import WeightTransferError
from penstock.weights.manifest import TensorEntry
from penstock.weights.staged import StagedWeights

# Staged bytes may be read-only memory. torch warns that it cannot say so of a tensor; nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By safetensors' name."""

TiedNames = list[str]
"""All the names of one tensor; usually one."""


def unpack(staged: StagedWeights) -> dict[str, Tensor]:
    """Every tensor by its name: views of the staged buffer, not to be written to."""
    return {entry.name: _view(staged, entry) for entry in staged.manifest.tensors}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightUpdate:
    """A version that was checked against a model, and is ready to be copied into it."""

    staged: StagedWeights
    copies: tuple[tuple[Tensor, Tensor], ...]
    """Pairs of (tensor of the model, tensor to copy): equal in shape, dtype and device."""

    @torch.no_grad()
    def apply(self) -> None:
        """Copies every tensor, in place. Nothing that it does can fail for the version's content."""
        for target, source in self.copies:
            target.copy_(source)
        if any(target.is_cuda for target, _ in self.copies):
            # Ends the pause when it ends: copies on a GPU only begin here.
            torch.cuda.synchronize()


def plan_update(model: nn.Module, staged: StagedWeights, *, convert: bool = False) -> WeightUpdate:
    """Checks a version against a model, and brings it to the model's device.

    Every tensor of the model must be there with its shape and, unless `convert` is set, its
    dtype. Of tensors that are tied, one is enough; if several are there they must be equal,
    bit by bit. The model is not touched. Raises WeightTransferError.
    """
    copies = [
        (target, source.to(device=target.device, dtype=target.dtype))
        for _, target, source in match(model, staged, convert=convert)
    ]
    return WeightUpdate(staged=staged, copies=tuple(copies))


def match(
    model: nn.Module, staged: StagedWeights, *, convert: bool = False
) -> list[tuple[TiedNames, Tensor, Tensor]]:
    """Each tensor of the model with the version's. The model may be on any device, `meta` included.

    Returns (its names, the model's tensor, the version's). Checks what `plan_update` promises.
    """
    given = unpack(staged)
    targets = _tensors_by_name(model)
    unknown = sorted(given.keys() - targets.keys())
    if unknown:
        raise _mismatch(staged, f"has tensors that the policy has not: {', '.join(unknown[:5])}")
    pairs = []
    for names in _tied(targets):
        present = [name for name in names if name in given]
        if not present:
            raise _mismatch(staged, f"lacks the tensor {names[0]}")
        target, source = targets[names[0]], given[present[0]]
        if target.shape != source.shape:
            raise _mismatch(
                staged, f"has {present[0]} of shape {list(source.shape)}; the policy has {list(target.shape)}"
            )
        for other in present[1:]:
            if not torch.equal(given[other].view(torch.uint8), source.view(torch.uint8)):
                raise _mismatch(staged, f"has different values for the tied tensors {present[0]} and {other}")
        if target.dtype != source.dtype and not convert:
            raise _mismatch(
                staged, f"has {present[0]} in {source.dtype}; the policy has it in {target.dtype}"
            )
        pairs.append((names, target, source))
    return pairs


def adopt_dtypes(model: nn.Module, staged: StagedWeights) -> None:
    """Gives each tensor of the model the dtype that a version has it in. Values become undefined."""
    targets = _tensors_by_name(model)
    for entry in staged.manifest.tensors:
        target = targets.get(entry.name)
        if target is not None:
            target.data = target.data.to(TORCH_DTYPES[entry.dtype])


def _view(staged: StagedWeights, entry: TensorEntry) -> Tensor:
    data = staged.buffer[entry.offset : entry.offset + entry.num_bytes]
    return torch.from_numpy(data).view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under all their names, tied ones included."""
    return model.state_dict(keep_vars=True)


def _tied(targets: dict[str, Tensor]) -> list[TiedNames]:
    """Names that stand for the same tensor, together."""
    groups: dict[int, TiedNames] = {}
    for name, tensor in targets.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _mismatch(staged: StagedWeights, what: str) -> WeightTransferError:
    return WeightTransferError(
        f"version {staged.manifest.version} {what}; nothing was installed. Are learner and actor running "
        "the same policy?"
    )
