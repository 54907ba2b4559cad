"""A reward model from preference pairs, written as a sequence classifier of one label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import AutoModelForSequenceClassification

from learner.offline.config import RmConfig
from learner.offline.result import write_result
from learner.offline.steps import context_of, make_updater, run_steps
from learner.training.examples import load_tokenizer, read_pairs
from learner.training.folder import check_output_folder
from learner.training.parallel import Ranks
from learner.training.preference import Pair, update_reward_model
from learner.training.scalar import as_scored, load_scalar_model
from learner.training.updater import UpdateReport


def train_rm(config: RmConfig, ranks: Ranks) -> float:
    """Trains and writes the model. Returns the mean loss of the last tenth of the steps. Raises PenstockError."""
    check_output_folder(config.out)
    torch.manual_seed(config.seed)
    model = load_scalar_model(
        config.policy,
        activation_checkpointing=config.activation_checkpointing,
        lora=config.lora,
        seed=config.seed,
    )
    tokenizer = load_tokenizer(config.policy)
    pairs = [_scored(pair) for pair in read_pairs(config.data, tokenizer, max_tokens=context_of(model))]
    updater = make_updater(model, ranks, config, config.optimizer)

    def step(batch: list[Pair], rate: float) -> tuple[UpdateReport, Mapping[str, float]]:
        report = update_reward_model(updater, batch, centering=config.centering, learning_rate=rate)
        return report.update, report.metrics

    final_loss = run_steps(
        config, config.optimizer, pairs, step,
        batch_size=config.batch_pairs, name="rm", quiet=not ranks.is_first,
    )  # fmt: skip
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    write_result(
        model,
        ranks,
        config,
        architecture=AutoModelForSequenceClassification,
        num_labels=1,
        pad_token_id=padding,
    )
    return final_loss


def _scored(pair: Pair) -> Pair:
    return replace(pair, chosen=as_scored(pair.chosen), rejected=as_scored(pair.rejected))
