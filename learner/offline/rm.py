"""A reward model from preference pairs, written as a sequence classifier of one label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from learner.offline.config import RmConfig
from learner.offline.result import write_result
from learner.offline.steps import make_updater, run_steps
from learner.training.examples import load_tokenizer, read_pairs
from learner.training.folder import check_output_folder
from learner.training.parallel import Ranks
from learner.training.policy import context_of
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
        deferred=True,
    )
    tokenizer = load_tokenizer(config.policy)
    # A stand-in follows each sequence (`as_scored`), and takes a position too.
    max_tokens = context_of(model) - 1
    pairs = [_scored(pair) for pair in read_pairs(config.data, tokenizer, max_tokens=max_tokens)]
    updater = make_updater(model, ranks, config, config.optimizer)

    def step(batch: list[Pair], rate: float) -> tuple[UpdateReport, Mapping[str, float]]:
        report = update_reward_model(updater, batch, centering=config.centering, learning_rate=rate)
        return report.update, report.metrics

    final_loss = run_steps(
        config, config.optimizer, pairs, step,
        batch_size=config.batch_pairs, name="rm", quiet=not ranks.is_first,
    )  # fmt: skip
    write_result(
        model,
        ranks,
        config,
        architecture=AutoModelForSequenceClassification,
        num_labels=1,
        pad_token_id=padding_id(tokenizer),
    )
    return final_loss


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What the written model pads with. Not the end token: transformers reads a reward off the last token that
    isn't padding, and rewards are trained to be read off the end token."""
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id not in (None, end):
        return int(tokenizer.pad_token_id)
    return next((int(token) for token in tokenizer.all_special_ids if token != end), 0 if end else 1)


def _scored(pair: Pair) -> Pair:
    return replace(pair, chosen=as_scored(pair.chosen), rejected=as_scored(pair.rejected))
