"""Settings of the offline algorithms, as `penstock train KIND RUN.toml` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from learner.algorithms.preference_recipe import PreferenceLoss, PreferenceRecipe
from learner.training.config import Device, LoraConfig, OptimizerConfig, Precision
from learner.training.preference_config import preference_recipe
from penstock.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineConfig:
    """What all of them have in common."""

    policy: Path
    """A Hugging Face folder: config.json, tokeniser, safetensors."""
    data: Path
    """A .jsonl or .parquet file; docs/algorithms.md says what its rows hold."""
    out: Path
    """Where the result is written, as a Hugging Face folder."""
    num_epochs: int = 1
    """Passes over the data."""
    num_steps: int = 0
    """Optimiser steps; 0 takes `num_epochs` passes, anything else ends or goes on regardless of them."""
    row_tokens: int = 4096
    """Token budget of a packed row. A longer example has a row of its own."""
    rows_per_pass: int = 1
    """Rows that go through the model together, as in `[training]`."""
    seed: int = 0
    num_ranks: int = 1
    """Processes on this host; FSDP2 shards the policy over them."""
    device: Device = Device.AUTO
    precision: Precision = Precision.FLOAT32
    activation_checkpointing: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        least_of = {"num_epochs": 1, "num_steps": 0, "num_ranks": 1, "row_tokens": 16, "rows_per_pass": 1}
        for name, least in least_of.items():
            require_at_least(self, name, least)


def require_at_least(config: object, name: str, least: float) -> None:
    """Raises ConfigError."""
    if getattr(config, name) < least:
        raise ConfigError(f"{name} is {getattr(config, name)}; expected at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(OfflineConfig):
    """Cross entropy of completions."""

    batch_sequences: int = 64
    """Examples of one step."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))

    def __post_init__(self) -> None:
        OfflineConfig.__post_init__(self)
        require_at_least(self, "batch_sequences", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig(OfflineConfig):
    """Direct preference optimisation, against the policy that it starts from."""

    batch_pairs: int = 32
    """Preference pairs of one step."""
    loss: PreferenceLoss = PreferenceLoss.SIGMOID
    beta: float | None = None
    """How far the policy may leave the reference; unset, it is 0.1, and 2.0 for simpo."""
    label_smoothing: float | None = None
    """cdpo and robust: the share of pairs with the wrong answer chosen."""
    margin: float | None = None
    """simpo: by how much the chosen answer is to be better."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-6))

    def __post_init__(self) -> None:
        OfflineConfig.__post_init__(self)
        require_at_least(self, "batch_pairs", 1)
        self.recipe()

    def recipe(self) -> PreferenceRecipe:
        """Raises ConfigError."""
        return preference_recipe(
            self.loss, beta=self.beta, label_smoothing=self.label_smoothing, margin=self.margin
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RmConfig(OfflineConfig):
    """A reward model: Bradley-Terry on pairs, with a margin where the data has one."""

    batch_pairs: int = 32
    """Preference pairs of one step."""
    centering: float = 0.0
    """Weight of (chosen + rejected)^2, which keeps rewards near 0; usually 0.01."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))

    def __post_init__(self) -> None:
        OfflineConfig.__post_init__(self)
        require_at_least(self, "batch_pairs", 1)
        require_at_least(self, "centering", 0.0)
