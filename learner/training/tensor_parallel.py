"""Tensor parallelism: neighbouring ranks hold a share of every matrix, and between matrices a share of the tokens.

Attention's and the MLP's first matrices are divided by rows, so that each rank has some of
the heads and channels for all tokens; their last ones by columns, whose products are added up
(Shoeybi et al. 2019, "Megatron-LM"). Norms and residuals work on each rank's slice of the
row's tokens (Korthikanti et al. 2022). The vocabulary is divided too, for the embedding and
for the logits (vocabulary.py).

T   tokens of a row, a multiple of the ranks     t   those of this rank     H   hidden size
V   vocabulary     v   this rank's part of it     S   sampled tokens of the row
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from learner.training.vocabulary import Part
from penstock.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""What config.json may name as model_type: models whose layers have the names below, and nothing else."""

_FIRST = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_LAST = ("o_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_HEAD_NORMS = ("q_norm", "k_norm")
_TOKENS = Shard(1)
"""Of [1, T, H]: each rank has a slice of the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """The ranks that hold shares of the same matrices, and this one's place among them."""

    mesh: DeviceMesh

    @property
    def size(self) -> int:
        return self.mesh.size()

    def all_tokens(self, hidden_tH: torch.Tensor, *, summed: bool) -> torch.Tensor:
        """[T, H] of the whole row on every rank.

        summed: each rank's gradient is a summand; else every rank has the same one.
        """
        hidden_TH = DTensor.from_local(hidden_tH, self.mesh, [Shard(0)]).redistribute(
            placements=[Replicate()]
        )
        gradients: list[Placement] = [Partial() if summed else Replicate()]
        local: torch.Tensor = hidden_TH.to_local(grad_placements=gradients)
        return local

    def part_of(self, weight_VH: torch.Tensor) -> Part:
        """This rank's rows of the matrix that gives the logits."""
        assert isinstance(weight_VH, DTensor)
        share = -(-weight_VH.shape[0] // self.size)
        start = self.mesh.get_local_rank() * share
        return Part(weight_vH=weight_VH.to_local(), start=start, group=self.mesh.get_group())


def divide(causal_lm: Any, group: TensorGroup) -> None:
    """Gives this rank its share of every matrix. No collective: each rank has the whole, or all are on meta.

    Raises ConfigError for a model that cannot be divided so.
    """
    _check(causal_lm.config, group.size)
    trained = {name for name, parameter in causal_lm.named_parameters() if parameter.requires_grad}
    _divide_vocabulary(causal_lm, group)
    styles = {
        name: style
        for name, module in causal_lm.base_model.named_modules()
        for name, style in _styles(name, module).items()
    }
    parallelize_module(causal_lm.base_model, group.mesh, styles, src_data_rank=None)
    for name, module in causal_lm.named_children():
        if module is not causal_lm.base_model:
            _replicate(module, group.mesh, name)
    for name, parameter in causal_lm.named_parameters():
        # Which torch's styles do not all preserve.
        parameter.requires_grad_(name in trained)


def _check(config: Any, size: int) -> None:
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"training.tensor_ranks is {size}, but a policy of type {config.model_type} cannot be divided so; "
            f"expected one of {', '.join(FAMILIES)}: set it to 1"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = getattr(config, name)
        if value % size:
            raise ConfigError(
                f"training.tensor_ranks is {size}, which does not divide the policy's {name}, {value}; "
                "expected a divisor of it: set it lower"
            )


def _styles(name: str, module: nn.Module) -> dict[str, ParallelStyle]:
    """How a module of the layers is divided, by its name or, if it has adapters, those of its parts."""
    kind = name.rpartition(".")[2]
    if kind in _FIRST + _LAST and not isinstance(module, nn.Linear):
        return _adapted_styles(name, is_first=kind in _FIRST)
    if kind in _FIRST:
        return {name: ColwiseParallel()}
    if kind in _LAST:
        return {name: RowwiseParallel(output_layouts=_TOKENS)}
    if kind in _NORMS:
        return {name: SequenceParallel(use_local_output=True)}
    if kind in _HEAD_NORMS:
        return {name: SequenceParallel(sequence_dim=2, use_local_output=True)}
    if kind == "mlp":
        return {name: PrepareModuleInput(input_layouts=_TOKENS, desired_input_layouts=Replicate())}
    if kind == "self_attn":
        return {
            name: PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": _TOKENS},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            )
        }
    return {}


def _adapted_styles(name: str, *, is_first: bool) -> dict[str, ParallelStyle]:
    """The smaller product is made of each rank's tokens."""
    base, a, b = f"{name}.base_layer", f"{name}.lora_A.default", f"{name}.lora_B.default"
    by_token = SequenceParallel(use_local_output=True)
    if is_first:
        return {base: ColwiseParallel(), a: by_token, b: ColwiseParallel(input_layouts=_TOKENS)}
    last = RowwiseParallel(output_layouts=_TOKENS)
    return {base: last, a: last, b: by_token}


def _divide_vocabulary(causal_lm: Any, group: TensorGroup) -> None:
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    weight = getattr(head, "weight", None)
    is_tied = weight is embedding.weight
    embedding.weight = _distributed(embedding.weight, group.mesh, Shard(0))
    embedding.forward = partial(_embed, embedding, group)
    if weight is not None:
        head.weight = embedding.weight if is_tied else _distributed(weight, group.mesh, Shard(0))


def _embed(embedding: nn.Embedding, group: TensorGroup, token_ids: torch.Tensor) -> torch.Tensor:
    """[1, T] to [1, t, H]: each rank looks up the tokens that it has rows of."""
    part = group.part_of(embedding.weight)
    rows = part.weight_vH.shape[0]
    local_ids = token_ids - part.start
    inside = (local_ids >= 0) & (local_ids < rows)
    padding = None if embedding.padding_idx is None else embedding.padding_idx - part.start
    found = nn.functional.embedding(
        local_ids.clamp(0, rows - 1),
        part.weight_vH,
        padding_idx=padding if padding is not None and 0 <= padding < rows else None,
    )
    summands = DTensor.from_local(found * inside.unsqueeze(-1), group.mesh, [Partial()])
    local: torch.Tensor = summands.redistribute(placements=[_TOKENS]).to_local()
    return local


def _replicate(module: nn.Module, mesh: DeviceMesh, name: str) -> None:
    """A head of a few numbers, which each rank has whole."""
    for key, parameter in list(module.named_parameters(name)):
        if not isinstance(parameter, DTensor):
            setattr(module, key.removeprefix(f"{name}."), _distributed(parameter, mesh, Replicate()))


def _distributed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    divided = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(divided, requires_grad=parameter.requires_grad)
