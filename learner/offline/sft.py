"""Supervised fine-tuning: packed rows, and a mask that leaves out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from learner.algorithms.sft import completion_cross_entropy
from learner.algorithms.sums import Sums
from learner.offline.config import SftConfig
from learner.offline.result import write_result
from learner.offline.steps import make_updater, run_steps
from learner.training.examples import load_tokenizer, read_examples
from learner.training.folder import check_output_folder
from learner.training.model import load_policy
from learner.training.packing import PackedRow, TokenSequence
from learner.training.parallel import Ranks
from learner.training.policy import TokenScores, context_of
from learner.training.updater import UpdateReport


def train_sft(config: SftConfig, ranks: Ranks) -> float:
    """Trains and writes the policy. Returns the mean loss of the last tenth of the steps. Raises PenstockError."""
    check_output_folder(config.out)
    torch.manual_seed(config.seed)
    policy = load_policy(
        config.policy,
        activation_checkpointing=config.activation_checkpointing,
        lora=config.lora,
        seed=config.seed,
        deferred=True,
    )
    tokenizer = load_tokenizer(config.policy)
    examples = read_examples(config.data, tokenizer, max_tokens=context_of(policy))
    updater = make_updater(policy, ranks, config, config.optimizer)

    def step(batch: list[TokenSequence], rate: float) -> tuple[UpdateReport, Mapping[str, float]]:
        return updater.update(batch, SftObjective(batch), learning_rate=rate), {}

    final_loss = run_steps(
        config, config.optimizer, examples, step,
        batch_size=config.batch_sequences, name="sft", quiet=not ranks.is_first,
    )  # fmt: skip
    write_result(policy, ranks, config)
    return final_loss


class SftObjective:
    """Cross entropy of one row's completions, normalised over the whole batch."""

    def __init__(self, batch: Sequence[TokenSequence]) -> None:
        self._num_tokens = sum(sequence.num_sampled for sequence in batch)

    def __call__(self, row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
        return completion_cross_entropy(scores.logprobs_S, num_tokens=self._num_tokens)
