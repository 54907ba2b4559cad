"""Low-rank adapters (LoRA, Hu et al. 2021) on a policy's linear layers, through peft.

The layers keep their weights W0, frozen, and compute W0 x + scale * B (A x). Only A and B are
trained, in float32; B is 0 at first. Every rank begins with the same A.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3
from torch import nn

from learner.training.config import ALL_LINEAR, LoraConfig
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from learner.training.policy import Policy

_NAME = "default"
_BASE = ".base_layer."
_A, _B = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """What a policy's adapters are, beside their values."""

    rank: int
    scale: float
    """What B A is multiplied by."""
    base_digest: str
    """Of the weights that they were added to."""


def add_adapters(causal_lm: Any, config: LoraConfig, *, base_digest: str, seed: int) -> Adapters:
    """Freezes a model and gives its linear layers adapters. Raises ConfigError."""
    peft = require_peft()
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scale * config.rank,
        target_modules=target_names(causal_lm, config.target_modules),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(settings, causal_lm, adapter_name=_NAME)
    for name, parameter in causal_lm.named_parameters():
        values = first_values(name, tuple(parameter.shape), seed=seed)
        if values is not None and not parameter.is_meta:
            parameter.data.copy_(values)
    return Adapters(rank=config.rank, scale=config.scale, base_digest=base_digest)


def first_values(name: str, shape: tuple[int, ...], *, seed: int) -> torch.Tensor | None:
    """What an adapter begins with, wherever it is made: noise in A, 0 in B. None for what is no adapter."""
    if name.endswith(_B):
        return torch.zeros(shape)
    if not name.endswith(_A):
        return None
    digest = blake3(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def base_name(name: str) -> str:
    """The name that a tensor has in the model without adapters."""
    return name.replace(_BASE, ".")


def require_peft() -> Any:
    """The library. Raises ConfigError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "lora.rank is set, but peft is not installed; `pip install 'penstock[lora]'`, or set lora.rank to 0"
        ) from error
    return peft


def target_names(causal_lm: Any, wanted: Sequence[str]) -> list[str]:
    """The full names of the layers that `lora.target_modules` means. Raises ConfigError."""
    modules = dict(causal_lm.named_modules())
    head = causal_lm.get_output_embeddings()
    linear = {
        name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head
    }
    found: set[str] = set()
    for name in wanted:
        meant = linear if name == ALL_LINEAR else {each for each in linear if _ends_with(each, name)}
        if not meant:
            others = [each for each in modules if _ends_with(each, name)]
            kind = (
                f"is a {type(modules[others[0]]).__name__}, or gives the logits" if others else "is no layer"
            )
            ends = ", ".join(sorted({each.rpartition(".")[2] for each in linear})) or "none"
            raise ConfigError(
                f"lora.target_modules has {name!r}, which {kind}; expected linear layers of the policy: {ends}"
            )
        found |= meant
    return sorted(found)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


@contextmanager
def without_adapters(policy: Policy) -> Iterator[None]:
    """The policy is its base meanwhile, exactly: what adapters give is multiplied by 0."""
    kind = require_peft().tuners.lora.LoraLayer
    layers: list[Any] = [module for module in policy.modules() if isinstance(module, kind)]
    scales: list[float] = [layer.scaling[_NAME] for layer in layers]
    for layer in layers:
        layer.scaling[_NAME] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_NAME] = scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A policy's tensors, told apart, by the names that the model has without adapters."""

    base: dict[str, torch.Tensor]
    a: dict[str, torch.Tensor]
    """[rank, columns] by the name of the base's matrix."""
    b: dict[str, torch.Tensor]
    """[rows, rank], the same."""


def parts_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> Parts:
    """Sorts tensors by their names, as `named_parameters` or a checkpoint has them."""
    parts = Parts(base={}, a={}, b={})
    for name, tensor in tensors:
        if name.endswith(_A):
            parts.a[name.removesuffix(_A) + ".weight"] = tensor
        elif name.endswith(_B):
            parts.b[name.removesuffix(_B) + ".weight"] = tensor
        else:
            parts.base[base_name(name)] = tensor
    return parts


def merged(base: Mapping[str, torch.Tensor], parts: Parts, scale: float) -> dict[str, torch.Tensor]:
    """The base with the adapters added, in float32 on the CPU, as versions are made."""
    from penstock.weights.adapters import LowRank, merge_matrix
    from penstock.weights.manifest import Factor

    whole = dict(base)
    for name, b in parts.b.items():
        part = LowRank(
            factor=Factor(tensor=name, rank=b.shape[1], scale=scale),
            b=_as_array(b),
            a=_as_array(parts.a[name]),
        )
        whole[name] = torch.from_numpy(merge_matrix(_as_array(base[name]), part))
    return whole


def _as_array(tensor: torch.Tensor) -> Any:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


def layer_names(tensors: Iterable[str]) -> list[str]:
    """The full names of the layers that have adapters."""
    return sorted(name.removesuffix(_A) for name in tensors if name.endswith(_A))


def peft_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapters by the names that peft's files have for them."""
    return {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor for name, tensor in tensors.items()}
