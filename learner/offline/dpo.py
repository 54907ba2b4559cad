"""Preference optimisation from files.

The reference is scored once, up front, before the policy moves: no second copy of it exists.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from learner.algorithms.preference_recipe import PreferenceLoss, PreferenceRecipe
from learner.offline.config import DpoConfig
from learner.offline.result import write_result
from learner.offline.steps import make_updater, run_steps
from learner.training.examples import load_tokenizer, read_pairs
from learner.training.folder import check_output_folder
from learner.training.model import load_policy
from learner.training.packing import TokenSequence
from learner.training.parallel import Ranks
from learner.training.policy import context_of
from learner.training.preference import Pair, PairReference, mismatched, reference_of, update_policy
from learner.training.updater import Updater, UpdateReport

_log = logging.getLogger(__name__)

PAIRS_PER_SCORING = 1024
"""Planning rows takes time that grows with the square of the sequences, and all of them are on the device at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    pair: Pair
    reference: PairReference | None
    other: TokenSequence | None
    """The prompt with another pair's answer; only for KTO."""


def train_dpo(config: DpoConfig, ranks: Ranks) -> float:
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
    pairs = read_pairs(config.data, tokenizer, max_tokens=context_of(policy))
    updater = make_updater(policy, ranks, config, config.optimizer)
    recipe = config.recipe()

    def step(batch: list[_Item], rate: float) -> tuple[UpdateReport, Mapping[str, float]]:
        references = [item.reference for item in batch if item.reference is not None]
        report = update_policy(
            updater,
            [item.pair for item in batch],
            references or None,
            recipe,
            others=[item.other for item in batch if item.other is not None],
            learning_rate=rate,
        )
        return report.update, report.metrics

    final_loss = run_steps(
        config, config.optimizer, _with_references(updater, recipe, pairs), step,
        batch_size=config.batch_pairs, name="dpo", quiet=not ranks.is_first,
    )  # fmt: skip
    write_result(policy, ranks, config)
    return final_loss


def _with_references(updater: Updater, recipe: PreferenceRecipe, pairs: list[Pair]) -> list[_Item]:
    is_kto = recipe.loss is PreferenceLoss.KTO
    others = mismatched(pairs, max_tokens=context_of(updater.policy)) if is_kto else []
    references: list[PairReference | None] = []
    for start in range(0, len(pairs), PAIRS_PER_SCORING):
        part = slice(start, start + PAIRS_PER_SCORING)
        found = reference_of(updater.score, pairs[part], recipe, others=others[part])
        references += found or [None] * len(pairs[part])
        if found and updater.ranks.is_first:
            _log.info("the reference has scored %d of %d pairs", len(references), len(pairs))
    return [
        _Item(pair=pair, reference=references[number], other=others[number] if others else None)
        for number, pair in enumerate(pairs)
    ]
