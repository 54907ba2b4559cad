"""Supervised fine-tuning: cross entropy of completions."""

from __future__ import annotations

import torch


def completion_cross_entropy(
    logprobs_S: torch.Tensor, *, num_tokens: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-1/N sum_S log pi over completion tokens; prompts are not trained on.

    logprobs_S: [S] float32, of the completion's tokens. num_tokens: N, completion tokens
    of the whole update. Returns the row's share of the loss, and no sums beside it.
    """
    return -logprobs_S.sum() / max(num_tokens, 1), {}
