"""A key-value cache with one row a slot, and the attention that reads it.

Shapes: N rows that decode, R rows that prefill, H key-value heads, G query heads a
key-value head, C the cache's length, L the longest context in use, P the longest
prompt, D a head's dimension.

The model runs as it is in `transformers`. The cache enters as `past_key_values`, and
the attention as a registered implementation for which transformers makes no mask: the
causal and sliding-window masks are made here, where each row's length is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from penstock.errors import ConfigError

ATTENTION = "penstock_slots"
"""The implementation's name in transformers' registry."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments that change what attention computes, and that `attend` does not know."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefill:
    """The next forward pass reads whole prompts, padded at the right."""

    rows_B: Tensor
    """[B] int64: which of the R prompts each new slot holds; equal prompts share one."""
    slots_B: Tensor
    """[B] int64."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decode:
    """The next forward pass reads one token for each of the first N slots."""

    positions_N: Tensor
    """[N] int64: where the token stands; all before it is in the cache."""
    length: int
    """L, the highest position plus one."""
    biases: dict[int | None, Tensor] = field(default_factory=dict)
    """The mask of each sliding window (None: no window), made when first needed."""

    def bias(self, window: int | None) -> Tensor:
        """[N, 1, 1, L] float32: 0 where a row attends, -inf elsewhere."""
        bias_N11L = self.biases.get(window)
        if bias_N11L is None:
            distance_NL = self.positions_N[:, None] - torch.arange(
                self.length, device=self.positions_N.device
            )
            hidden_NL = distance_NL < 0
            if window is not None:
                hidden_NL |= distance_NL >= window
            zeros_NL = torch.zeros(hidden_NL.shape, device=hidden_NL.device)
            bias_N11L = zeros_NL.masked_fill_(hidden_NL, -torch.inf)[:, None, None]
            self.biases[window] = bias_N11L
        return bias_N11L


class SlotCache(Cache):  # type: ignore[misc]
    """Keys and values of every slot. `step` says what the next forward pass does with them."""

    def __init__(self, *, num_layers: int, num_slots: int, max_context: int) -> None:
        self.step: Prefill | Decode | None = None
        self.slot_layers = [SlotLayer(self, num_slots, max_context) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Moves slots, the first `length` positions of each."""
        for layer in self.slot_layers:
            for stored in (layer.keys, layer.values):
                stored[targets, :, :length] = stored[sources, :, :length]


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values: [num_slots, H, C, D], allocated when their shape is known."""

    is_sliding = False

    def __init__(self, cache: SlotCache, num_slots: int, max_context: int) -> None:
        super().__init__()
        self._cache = cache
        self._num_slots = num_slots
        self._max_context = max_context

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores what is new, and returns all that the new tokens attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self._cache.step
        if isinstance(step, Decode):
            return (
                _append(self.keys, key_states, step),
                _append(self.values, value_states, step),
            )
        assert isinstance(step, Prefill)
        length = key_states.shape[2]
        self.keys[step.slots_B, :, :length] = key_states[step.rows_B]
        self.values[step.slots_B, :, :length] = value_states[step.rows_B]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: positions are always given to the model, never derived from the cache."""
        return 0

    def get_max_length(self) -> int:
        return self._max_context

    def _allocate(self, states: Tensor) -> Tensor:
        _, num_heads, _, head_dim = states.shape
        return states.new_zeros(self._num_slots, num_heads, self._max_context, head_dim)


def _append(stored: Tensor, states_NH1D: Tensor, step: Decode) -> Tensor:
    """Writes one position of each row; returns the view [N, H, L, D]."""
    num_rows, num_heads, _, head_dim = states_NH1D.shape
    index = step.positions_N[:, None, None, None].expand(num_rows, num_heads, 1, head_dim)
    active = stored[:num_rows]
    active.scatter_(2, index, states_NH1D)
    return active[:, :, : step.length]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slots: SlotCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers' models call. Returns [rows, tokens, heads, D]."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"this policy's attention uses {name!r}, which the torch engine does not have; use the vllm engine"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(slots.step, Decode):
        return _attend_decode(query, key, value, slots.step.bias(sliding_window), scale), None
    return _attend_prefill(query, key, value, sliding_window, scale), None


def _attend_decode(
    query: Tensor, key_NHLD: Tensor, value_NHLD: Tensor, bias_N11L: Tensor, scale: float
) -> Tensor:
    num_rows, num_kv_heads, _, head_dim = key_NHLD.shape
    query_NHGD = query.reshape(num_rows, num_kv_heads, -1, head_dim)
    scores_NHGL = torch.matmul(query_NHGD, key_NHLD.transpose(2, 3)).float().mul_(scale).add_(bias_N11L)
    weights_NHGL = scores_NHGL.softmax(dim=-1).to(value_NHLD.dtype)
    return torch.matmul(weights_NHGL, value_NHLD).reshape(num_rows, 1, -1, value_NHLD.shape[-1])


def _attend_prefill(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """Padding needs no mask: it stands to the right of all that is read."""
    length = query.shape[2]
    mask_PP = None
    if window is not None and length > window:
        distance_PP = torch.arange(length, device=query.device)[:, None] - torch.arange(
            length, device=query.device
        )
        mask_PP = (distance_PP >= 0) & (distance_PP < window)
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_PP,
        is_causal=mask_PP is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2)


AttentionInterface.register(ATTENTION, attend)
