"""Attention over packed rows: no token sees another sequence, and no [T, T] mask exists.

Registered with transformers under PACKED, so that any model that takes its attention
from transformers' registry runs on packed rows unchanged. On CUDA in half precision it
calls flash-attn where it is installed, else `torch.nn.attention.varlen`; everywhere else
it evaluates sequences of similar length together, padded only inside attention.

T   tokens of a row        N   sequences of a bucket     L   their padded length
H   query heads            K   key-value heads           D   width of a head
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from learner.training.causal import causal_attention, hidden_from
from learner.training.context import ContextGroup
from learner.training.prefixes import Forest, take
from learner.training.transfer import to_device

PACKED = "penstock_packed"

_log = logging.getLogger(__name__)

_KEPT_LENGTH = 1024
"""Up to this length attention weights are kept for the backward pass; beyond, SDPA computes them again."""
_BUCKET_SCORES = 1 << 20
"""Bound on N * L * L of a bucket, so that the scores of short sequences stay in cache."""
_MIN_FILL = 0.8
"""A sequence shorter than this share of a bucket's longest begins a new bucket."""


class AttentionUnsupported(Exception):
    """This model asks its attention for something that packed rows don't offer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Neighbouring sequences of similar length, evaluated as one padded batch."""

    start: int
    stop: int
    """Tokens start:stop of the row."""
    num_sequences: int
    length: int
    gather_NL: torch.Tensor | None
    """[N * L] int64 into start:stop, padding points at token 0; None when all lengths are equal."""
    scatter: torch.Tensor | None
    """[stop - start] int64 into [N * L]."""


class RowLayout:
    """Where a row's sequences begin and end. Lengths must not increase."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        context: ContextGroup | None = None,
        forest: Forest | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        self.device = device
        self.context = context
        """Who holds the row's other tokens; None where this rank holds all."""
        self.forest = forest
        """Where the row's tokens are nodes: the lengths are then those of its branches."""
        self.max_length = self.lengths[0]

    @cached_property
    def cumulative(self) -> torch.Tensor:
        """[sequences + 1] int32."""
        cumulative = torch.zeros(len(self.lengths) + 1, dtype=torch.int32)
        cumulative[1:] = torch.tensor(self.lengths).cumsum(0)
        return to_device(cumulative, self.device)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(_bucket(start, part, self.device) for start, part in _bucket_lengths(self.lengths))


def _bucket_lengths(lengths: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Cuts the row into (first token, lengths) of each bucket."""
    start = first = 0
    for index in range(1, len(lengths) + 1):
        longest = lengths[first]
        full = (index - first + 1) * longest * longest > _BUCKET_SCORES
        if index == len(lengths) or full or lengths[index] < _MIN_FILL * longest:
            yield start, lengths[first:index]
            start += sum(lengths[first:index])
            first = index


def _bucket(start: int, lengths: Sequence[int], device: torch.device) -> Bucket:
    longest, total = lengths[0], sum(lengths)
    gather_NL = scatter = None
    if lengths[-1] != longest:
        lengths_N = torch.tensor(lengths)
        inside_NL = torch.arange(longest) < lengths_N[:, None]
        first_N = lengths_N.cumsum(0) - lengths_N
        index_NL = first_N[:, None] + torch.arange(longest)
        gather_NL = torch.where(inside_NL, index_NL, 0).flatten().to(device)
        scatter = inside_NL.flatten().nonzero()[:, 0].to(device)
    return Bucket(
        start=start,
        stop=start + total,
        num_sequences=len(lengths),
        length=longest,
        gather_NL=gather_NL,
        scatter=scatter,
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_layout: RowLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of one row, as transformers' attention interface calls it.

    query: [1, H, T, D]; key, value: [1, K, T, D]. Returns [1, T, H, D]. Dropout is never
    applied. Raises AttentionUnsupported for a feature that is not implemented here.
    """
    _refuse_unsupported(row_layout, attention_mask, kwargs)
    assert row_layout is not None
    query_THD, key_TKD, value_TKD = (states[0].transpose(0, 1) for states in (query, key, value))
    if row_layout.context is not None:
        query_THD, key_TKD, value_TKD = _take_heads(row_layout.context, query_THD, key_TKD, value_TKD)
    if row_layout.forest is not None:
        query_THD, key_TKD, value_TKD = (
            take(states, row_layout.forest.branches_E) for states in (query_THD, key_TKD, value_TKD)
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        out = _varlen(query_THD, key_TKD, value_TKD, row_layout, scale, sliding_window)
    else:
        out = _bucketed(query_THD, key_TKD, value_TKD, row_layout, scale, sliding_window)
    if row_layout.forest is not None:
        out = take(out, row_layout.forest.places_U)
    if row_layout.context is not None:
        out = row_layout.context.heads_for_tokens(out)
    return out.unsqueeze(0), None


def _take_heads(
    context: ContextGroup, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """From some tokens of all heads to all tokens of some heads."""
    if key.shape[1] % context.size:
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return tuple(context.tokens_for_heads(states) for states in (query, key, value))


def _refuse_unsupported(layout: RowLayout | None, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    if layout is None:
        raise AttentionUnsupported("the model does not hand its keyword arguments on to attention")
    if mask is not None:
        raise AttentionUnsupported("the model makes a mask of its own")
    for name in ("softcap", "s_aux", "position_bias", "indices"):
        if kwargs.get(name) is not None:
            raise AttentionUnsupported(f"the model's attention uses {name}")


def _varlen(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    layout: RowLayout,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    flash = _flash_kernel()
    bounds, longest = layout.cumulative, layout.max_length
    window_size = (-1 if window is None else window - 1, 0)
    grouped: dict[str, Any] = {}
    if flash is None and query_THD.shape[1] != key_TKD.shape[1]:
        if _takes_groups(query_THD.device):
            grouped = _grouped_option()
        else:
            key_TKD, value_TKD = _repeated(query_THD, key_TKD, value_TKD)
    query, key, value = query_THD.contiguous(), key_TKD.contiguous(), value_TKD.contiguous()
    if flash is not None:
        return flash(
            query, key, value, bounds, bounds, longest, longest,
            softmax_scale=scale, causal=True, window_size=window_size,
        )  # fmt: skip
    out = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window_size, **grouped
    )
    assert isinstance(out, torch.Tensor)
    return out


def _repeated(
    query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values once for each query head."""
    repeats = query_THD.shape[1] // key_TKD.shape[1]
    return key_TKD.repeat_interleave(repeats, dim=1), value_TKD.repeat_interleave(repeats, dim=1)


def prepare(device: torch.device) -> None:
    """Finds out what the device's kernels can do. Call it before any pass: a checkpointed block must not."""
    if device.type == "cuda" and _flash_kernel() is None:
        _takes_groups(device)


@cache
def _grouped_option() -> dict[str, Any]:
    """torch 2.11's function takes fewer key heads without being told."""
    named = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if named else {}


@cache
def _takes_groups(device: torch.device) -> bool:
    """Whether torch's kernel gives several query heads to a key head, and gets their gradients right.

    Where it does, keys and values need not be repeated, nor the repeated ones kept. Logs why not.
    """
    try:
        with torch.enable_grad():
            grouped, repeated = (_tiny_attention(device, repeat=repeat) for repeat in (False, True))
        for one, other in zip(grouped, repeated, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    except Exception as error:  # noqa: BLE001
        _log.warning("attention repeats keys and values for each query head: %s", error)
        return False
    return True


def _tiny_attention(device: torch.device, *, repeat: bool) -> list[torch.Tensor]:
    """(output, gradients by queries, keys and values) of two sequences with two query heads a key head."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(24, heads, 64, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for heads in (4, 2, 2)
    )
    keys, values = _repeated(query, key, value) if repeat else (key, value)
    bounds = torch.tensor([0, 16, 24], dtype=torch.int32, device=device)
    option = {} if repeat else _grouped_option()
    out = varlen_attn(query, keys, values, bounds, bounds, 16, 16, window_size=(-1, 0), **option)
    assert isinstance(out, torch.Tensor)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (query, key, value))]


@cache
def _flash_kernel() -> Callable[..., torch.Tensor] | None:
    """flash-attn's kernel for sequences end to end, where the package is installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    kernel: Callable[..., torch.Tensor] = importlib.import_module("flash_attn").flash_attn_varlen_func
    return kernel


def _bucketed(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    layout: RowLayout,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    sizes = [bucket.stop - bucket.start for bucket in layout.buckets]
    outs = []
    for bucket, *states in zip(
        layout.buckets,
        *(torch.split(states, sizes) for states in (query_THD, key_TKD, value_TKD)),
        strict=True,
    ):
        query, key, value = (_pad(part, bucket) for part in states)
        attend = causal_attention if bucket.length <= _KEPT_LENGTH else _sdpa
        out_NHLD = attend(query, key, value, scale, window)
        outs.append(_unpad(out_NHLD, bucket))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _pad(part: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """The bucket's [*, heads, D] to [N, heads, L, D]. Padding repeats a token; causality hides it from all before."""
    heads, width = part.shape[1:]
    if bucket.gather_NL is not None:
        part = part.flatten(1).index_select(0, bucket.gather_NL)
    return part.reshape(bucket.num_sequences, bucket.length, heads, width).transpose(1, 2)


def _unpad(states_NHLD: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """[N, H, L, D] back to the bucket's tokens [*, H, D]."""
    heads, width = states_NHLD.shape[1], states_NHLD.shape[3]
    flat = states_NHLD.transpose(1, 2).reshape(-1, heads * width)
    if bucket.scatter is not None:
        flat = flat.index_select(0, bucket.scatter)
    return flat.view(-1, heads, width)


def _sdpa(
    query_NHLD: torch.Tensor,
    key_NKLD: torch.Tensor,
    value_NKLD: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """torch's own, whose memory grows with L, not its square, unless a window needs a mask."""
    L, groups = query_NHLD.shape[2], query_NHLD.shape[1] // key_NKLD.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key_NKLD, value_NKLD))
    banded = window is not None and window < L
    mask = ~hidden_from(L, L, window, query_NHLD.device) if banded else None
    return torch.nn.functional.scaled_dot_product_attention(
        query_NHLD, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
    )


AttentionInterface.register(PACKED, packed_attention)
