"""A model that gives one number where a policy gives log-probabilities: a reward model, or a critic.

A policy whose language head is replaced by a linear one to a single number, under the
names that transformers gives a sequence classifier of one label. Rewards are read off the
last token of a sequence, values before each sampled token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from learner.training.config import LoraConfig
from learner.training.model import load_policy
from learner.training.packing import PackedRow, TokenSequence
from learner.training.parallel import local
from learner.training.policy import Evaluation, Policy
from learner.training.prefixes import take
from penstock.errors import ConfigError

HEAD = "score"


class ScalarModel(Policy):
    """Its `logprobs_S` are the head's numbers where each of the row's learned tokens is predicted."""

    def __init__(self, causal_lm: Any, evaluation: Evaluation) -> None:
        super().__init__(causal_lm, evaluation)
        hidden_size = causal_lm.get_input_embeddings().weight.shape[1]
        head = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(head.weight)
        setattr(causal_lm, HEAD, head)
        causal_lm.set_output_embeddings(nn.Identity())

    def _score(self, row: PackedRow, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_TH = self._hidden(row, self._layout(row))
        if self.tensor is not None:
            hidden_TH = self.tensor.all_tokens(hidden_TH, summed=False)
        weight_1H = local(getattr(self.causal_lm, HEAD).weight)
        numbers_S = nn.functional.linear(take(hidden_TH, row.predictors_S), weight_1H).squeeze(-1).float()
        return numbers_S, torch.zeros_like(numbers_S)


def load_scalar_model(
    folder: Path,
    *,
    activation_checkpointing: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
    deferred: bool = False,
) -> ScalarModel:
    """A policy's layers, with a head that says 0 of everything. Raises ConfigError.

    The head is trained whole, also where the layers get adapters.
    """
    policy = load_policy(
        folder, activation_checkpointing=activation_checkpointing, lora=lora, seed=seed, deferred=deferred
    )
    if not policy.evaluation.split_head:
        name = type(policy.causal_lm).__name__
        raise ConfigError(
            f"{folder}: {name} does more after its last layer than its language head; its states cannot be scored"
        )
    model = ScalarModel(policy.causal_lm, policy.evaluation)
    model.adapters, model.source = policy.adapters, policy.source
    return model


def as_scored(sequence: TokenSequence) -> TokenSequence:
    """Asks for one number, at the sequence's last token: what follows it is a stand-in, which no state sees."""
    mask = np.zeros(sequence.num_tokens + 1, dtype=np.uint8)
    mask[-1] = 1
    return TokenSequence(token_ids=np.append(sequence.token_ids, sequence.token_ids[-1]), loss_mask=mask)


def all_scored(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    return [as_scored(sequence) for sequence in sequences]
