"""Log-probabilities of given tokens, in float32, without the whole [S, V] matrix.

S   sampled tokens        V   vocabulary        H   hidden size
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 24
"""Bound on S * V of one chunk: 64 MiB of float32."""


def token_logprobs(
    hidden_SH: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets_S: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores tokens from the hidden states that predict them.

    hidden_SH: [S, H], any float dtype. head: [*, H] to logits [*, V]. Returns
    (logprobs_S, entropy_S), both [S] float32; the entropy carries no gradient. Chunks of
    more than one are computed again in the backward pass instead of being kept.
    """
    chunk = max(1, chunk_elements // vocab_size)
    if hidden_SH.shape[0] <= chunk:
        return score_logits(head(hidden_SH), targets_S, temperature=temperature)

    def score(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return score_logits(head(hidden), targets, temperature=temperature)

    parts = [
        checkpoint(score, hidden, targets, use_reentrant=False, preserve_rng_state=False)
        for hidden, targets in zip(torch.split(hidden_SH, chunk), torch.split(targets_S, chunk), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def score_logits(
    logits_SV: torch.Tensor, targets_S: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature) at the targets, and the distribution's entropy, in nats.

    logits_SV: [S, V], any float dtype; -inf rules a token out. Returns two [S] float32.
    """
    scaled_SV = logits_SV.float()
    if temperature != 1.0:
        scaled_SV = scaled_SV / temperature
    logprobs_S = -torch.nn.functional.cross_entropy(scaled_SV, targets_S, reduction="none")
    with torch.no_grad():
        all_SV = scaled_SV.log_softmax(-1)
        probabilities_SV = all_SV.exp()
        entropy_S = -torch.where(probabilities_SV > 0, probabilities_SV * all_SV, 0.0).sum(-1)
    return logprobs_S, entropy_S
