"""Causal attention, made for CPUs: a few large matrix products, half the scores, one pass over them each way.

Queries are taken in blocks, each against the keys that it may see, so that scores above the
diagonal are mostly never computed. The weights are kept for the backward pass.

N   sequences     K   key-value heads     G   query heads of each     L   length     D   width
B   queries of a block     S   keys that they may see
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

_BLOCK = 128


def causal_attention(
    query_NHLD: torch.Tensor,
    key_NKLD: torch.Tensor,
    value_NKLD: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """softmax(scale Q K^T) V over keys up to each query, and fewer than `window` before it. Returns [N, H, L, D]."""
    N, H, L, D = query_NHLD.shape
    K = key_NKLD.shape[1]
    # Heads of one group stand behind each other per position, so that a block of queries is one slice.
    query = query_NHLD.reshape(N * K, H // K, L, D).transpose(1, 2)
    key, value = key_NKLD.reshape(N * K, L, D), value_NKLD.reshape(N * K, L, -1)
    out: torch.Tensor = _CausalAttention.apply(query, key, value, scale, window)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).reshape(N, H, L, -1)


class _CausalAttention(torch.autograd.Function):
    """query: [N K, L, G, D]; key, value: [N K, L, D]. Returns [N K, L, G, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        query = query.contiguous()
        out = query.new_empty((*query.shape[:3], value.shape[2]))
        kept = []
        for rows, keys in _blocks(key.shape[1], window):
            scores = torch.bmm(query[:, rows].flatten(1, 2), key[:, keys].mT).mul_(scale)
            by_query = _split_heads(scores, query)
            by_query += _bias(by_query.shape[1], by_query.shape[3], window, scores.dtype, scores.device)[
                :, None
            ]
            weights = scores.softmax(-1)
            out[:, rows] = _split_heads(torch.bmm(weights, value[:, keys]), query)
            kept.append(weights)
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, *kept = ctx.saved_tensors
        to_out = gradients[0].contiguous()
        # d scores = weights (d weights - sum over keys of weights d weights); the sum is out . d out.
        means = torch.linalg.vecdot(out, to_out).unsqueeze(-1)
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (rows, keys), weights in zip(_blocks(key.shape[1], ctx.window), kept, strict=True):
            to_out_rows = to_out[:, rows].flatten(1, 2)
            to_value[:, keys].baddbmm_(weights.mT, to_out_rows)
            to_scores = torch.bmm(to_out_rows, value[:, keys].mT)
            to_scores = to_scores.sub_(means[:, rows].flatten(1, 2)).mul_(weights).mul_(ctx.scale)
            to_query[:, rows] = _split_heads(torch.bmm(to_scores, key[:, keys]), query)
            to_key[:, keys].baddbmm_(to_scores.mT, query[:, rows].flatten(1, 2))
        return to_query, to_key, to_value, None, None


def _split_heads(rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[*, B G, S] to [*, B, G, S]."""
    return rows.view(rows.shape[0], -1, query.shape[2], rows.shape[2])


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Of each block of queries: its rows, and the keys that any of them sees."""
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, stop)


@lru_cache(maxsize=256)
def _bias(
    num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[B, S]: 0 where the key is seen, else -inf. The last query sees the last key."""
    hidden = hidden_from(num_queries, num_keys, window, device)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def hidden_from(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[B, S] bool: True where a key comes after the query, or `window` or more before it; both end together."""
    position_B = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    position_S = torch.arange(num_keys, device=device)
    hidden = position_S > position_B
    return hidden if window is None else hidden | (position_S <= position_B - window)
