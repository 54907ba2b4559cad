"""Writes what was trained: a Hugging Face folder, and beside the whole weights the adapters, if those were trained."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from learner.offline.config import OfflineConfig
from learner.training.adapter_folder import write_adapter_folder
from learner.training.folder import write_policy_folder
from learner.training.parallel import Ranks, whole
from learner.training.policy import Policy
from learner.training.publish import full_tensors, trained_tensors

ADAPTER = "adapter"
"""The folder of adapters, in the one of the whole weights."""


def write_result(
    policy: Policy,
    ranks: Ranks,
    config: OfflineConfig,
    *,
    architecture: Any = AutoModelForCausalLM,
    **settings: int,
) -> None:
    """Every rank calls it. architecture, settings: as write_policy_folder takes them. Raises ConfigError."""
    tensors = full_tensors(policy, ranks)
    if ranks.is_first:
        write_policy_folder(
            config.out,
            tensors,
            source=config.policy,
            precision=config.precision,
            architecture=architecture,
            **settings,
        )
    if policy.adapters is not None:
        trained = {name: whole(tensor) for name, tensor in trained_tensors(policy)}
        if ranks.is_first:
            write_adapter_folder(
                config.out / ADAPTER,
                trained,
                policy.adapters,
                source=config.policy,
                precision=config.precision,
            )
