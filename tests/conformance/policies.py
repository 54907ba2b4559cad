"""Tiny policies of several architectures, and what transformers itself computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from penstock.trajectory import PolicyVersion, TokenIds
from penstock.weights.manifest import HostTensor
from penstock.weights.staged import StagedWeights, stage

VOCAB_SIZE = 48
MAX_CONTEXT = 512
STOP_IDS = (1, 5)

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # vLLM's kernels for CPUs begin at 32.
    "head_dim": 32,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": None,
    "pad_token_id": 0,
    # Sharpens the distributions, so that a wrong token or position shows.
    "initializer_range": 0.3,
}


def configs() -> dict[str, PretrainedConfig]:
    """Architectures that every engine must run, by name. None of them stops by itself."""
    return {
        "qwen3-tied": Qwen3Config(**_SMALL, tie_word_embeddings=True, eos_token_id=None),
        "qwen3-untied": Qwen3Config(**_SMALL, tie_word_embeddings=False, eos_token_id=None),
        "llama": LlamaConfig(**_SMALL, tie_word_embeddings=False, eos_token_id=None),
        "mistral-sliding": MistralConfig(**_SMALL, sliding_window=6, eos_token_id=None),
        "qwen3-moe": Qwen3MoeConfig(
            **_SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, eos_token_id=None
        ),
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Policy:
    """A folder that an engine starts from, and a model to compare it with."""

    folder: Path
    model: nn.Module

    def stage(self, version: PolicyVersion) -> StagedWeights:
        return stage(version, host_tensors(self.model))

    def perturb(self, seed: int) -> None:
        """Changes every tensor."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)

    def logprobs(self, prompt: TokenIds, completion: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Of each token of the completion, by one plain forward pass over the whole."""
        return completion_logprobs(self.logits(prompt, completion), completion, temperature)

    def logits(self, prompt: TokenIds, completion: Sequence[int]) -> Tensor:
        """[T, V]: the logits before each token of the completion."""
        ids = torch.tensor([[*prompt.tolist(), *completion]])
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=ids).logits[0]
        return logits[len(prompt) - 1 : -1]

    def greedy(self, prompt: TokenIds, max_tokens: int) -> list[int]:
        """What transformers' own generate writes."""
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        with torch.no_grad():
            output = self.model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


def write_policy(folder: Path, config: PretrainedConfig, *, seed: int = 0) -> Policy:
    """Writes the folder's config.json alone: engines need no weights to start."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return Policy(folder=folder, model=model.eval())


def host_tensors(model: nn.Module) -> list[HostTensor]:
    """Each tensor once, as a Hugging Face checkpoint has them."""
    tensors = []
    for name, parameter in model.named_parameters():
        array = np.ascontiguousarray(parameter.detach().numpy())
        data = array.reshape(-1).view(np.uint8).copy()
        tensors.append(HostTensor(name=name, dtype="F32", shape=tuple(parameter.shape), data=data))
    return tensors


def logprobs_over_versions(
    prompt: TokenIds, completion: Sequence[int], parts: Sequence[tuple[nn.Module, int]]
) -> list[float]:
    """What a sequence's log-probabilities are when the weights change in its middle.

    parts: models, each with the number of tokens that it sampled. The keys and values of
    all that was computed before a switch are those of the earlier weights.
    """
    cache = DynamicCache()
    pending = prompt.tolist()
    start = 0
    logprobs: list[float] = []
    for model, num_tokens in parts:
        tokens = list(completion[start : start + num_tokens])
        with torch.no_grad():
            read = torch.tensor([pending + tokens[:-1]])
            logits = model(input_ids=read, past_key_values=cache, use_cache=True).logits[0]
        logprobs += completion_logprobs(logits[len(pending) - 1 :], tokens)
        pending = tokens[-1:]
        start += num_tokens
    return logprobs


def completion_logprobs(logits: Tensor, completion: Sequence[int], temperature: float = 1.0) -> list[float]:
    table = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen: list[float] = table.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1).tolist()
    return chosen
