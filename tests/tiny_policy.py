"""Tiny policies for tests: real Hugging Face folders, made in milliseconds."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from penstock.quickstart.policy import make_policy

CHARACTERS = string.digits + string.ascii_lowercase + " +-*/=.,:?!\n"
VOCAB_SIZE = 3 + len(CHARACTERS)
EOS_ID = 1

SIZES = {
    "vocab_size": 51,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
"""Of policies of any family, which ranks can share."""

ADAM_EPS = 1e-6
"""Larger than rounding, so that Adam does not make steps of what is left of gradients of 0."""


def write_tiny_policy(
    folder: Path, *, hidden_size: int = 32, num_layers: int = 2, tied: bool = True, seed: int = 0
) -> Path:
    """Qwen3 with four heads and one token a character; 27,000 parameters by default."""
    return make_policy(
        folder,
        seed=seed,
        characters=CHARACTERS,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=4 * hidden_size,
        head_dim=hidden_size // 4,
        tied=tied,
    )


def write_family(folder: Path, config: PreTrainedConfig) -> None:
    """Random weights, also where they usually begin at 0 or 1."""
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in causal_lm.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    causal_lm.save_pretrained(folder)
