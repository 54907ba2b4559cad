"""Weights that each rank reads for itself are those that are loaded whole."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from learner.training.config import Device, LoraConfig, OptimizerConfig, Precision, TrainingConfig
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.parallel import Ranks, open_ranks, place, whole
from learner.training.policy import Policy
from learner.training.tensor_parallel import FAMILIES
from learner.training.updater import Updater, UpdateReport
from penstock.errors import ConfigError
from tests.layouts import ONE_RANK, WeightedLogprobs, make_sequences
from tests.tiny_policy import write_tiny_policy

SIZES = {
    "vocab_size": 51,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LONG_CONTEXT = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, rope_parameters=LONG_CONTEXT, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=8),
}


def write_model(folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


@contextmanager
def one_rank(precision: Precision) -> Iterator[Ranks]:
    """In float32 there is no process group; in half precision FSDP2 keeps float32 masters."""
    ranks = open_ranks(Device.CPU, precision)
    try:
        yield ranks
    finally:
        ranks.close()


def scores(policy: Policy) -> np.ndarray:
    updater = Updater(
        policy, make_optimizer(policy, OptimizerConfig()), ONE_RANK, row_tokens=64, max_grad_norm=1.0
    )
    return np.concatenate(updater.score(make_sequences()))


def assert_alike(deferred: Policy, loaded: Policy, ranks: Ranks, precision: Precision) -> None:
    for policy in (deferred, loaded):
        place(policy, ranks, precision)
    expected = dict(loaded.named_parameters(remove_duplicate=False))
    for name, parameter in deferred.named_parameters(remove_duplicate=False):
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(whole(parameter), whole(expected[name])), name
    assert np.array_equal(scores(deferred), scores(loaded))


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_scores_as_if_it_were_loaded_whole(tmp_path: Path, name: str, precision: Precision) -> None:
    folder = write_model(tmp_path, CONFIGS[name], dtype=torch.bfloat16)
    deferred, loaded = load_policy(folder, deferred=True), load_policy(folder)
    assert all(parameter.is_meta for parameter in deferred.parameters())
    assert deferred.evaluation == loaded.evaluation
    with one_rank(precision) as ranks:
        assert_alike(deferred, loaded, ranks, precision)
        causal_lm = deferred.causal_lm
        tied = causal_lm.lm_head.weight is causal_lm.model.embed_tokens.weight
        assert tied == CONFIGS[name].tie_word_embeddings


@pytest.mark.parametrize("precision", list(Precision))
def test_adapters_begin_with_the_same_values(tmp_path: Path, precision: Precision) -> None:
    folder = write_model(tmp_path, CONFIGS["qwen3"])
    lora = LoraConfig(rank=3)
    deferred = load_policy(folder, lora=lora, seed=5, deferred=True)
    with one_rank(precision) as ranks:
        assert_alike(deferred, load_policy(folder, lora=lora, seed=5), ranks, precision)


def test_another_architecture_is_loaded_whole_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1)
    with caplog.at_level(logging.INFO):
        policy = load_policy(write_model(tmp_path, config), deferred=True)
    assert "policies of type gpt2 are loaded whole by each rank" in caplog.text
    assert not any(parameter.is_meta for parameter in policy.parameters())


def test_weights_of_another_shape_are_named_as_ever(tmp_path: Path) -> None:
    folder = write_model(tmp_path, CONFIGS["qwen2"])
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 48', '"intermediate_size": 64'))
    with pytest.raises(ConfigError, match=r"have another shape than config.json says, such as model\.layers"):
        load_policy(folder, deferred=True)


def test_weights_that_are_not_finite_are_refused_by_the_rank_that_reads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    with torch.no_grad():
        causal_lm.model.norm.weight[3] = float("nan")
    causal_lm.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, deferred=True)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has values that are not finite"):
        place(policy, ONE_RANK, Precision.FLOAT32)


@pytest.mark.parametrize("deferred", [True, False])
def test_updates_of_parameters_that_wait_in_host_memory_are_the_same(tmp_path: Path, deferred: bool) -> None:
    folder = write_tiny_policy(tmp_path)
    with one_rank(Precision.BFLOAT16) as ranks:
        expected, *_ = updates(folder, ranks)
        offloaded = dataclasses.replace(ranks, offload=True)
        got, updater = updates(folder, offloaded, deferred=deferred)
        assert got == expected
        assert all(parameter.device.type == "cpu" for parameter in updater.policy.parameters())


def updates(folder: Path, ranks: Ranks, *, deferred: bool = False) -> tuple[list[UpdateReport], Updater]:
    policy = load_policy(folder, deferred=deferred)
    place(policy, ranks, Precision.BFLOAT16)
    optimizer = make_optimizer(policy, OptimizerConfig())
    updater = Updater(policy, optimizer, ranks, row_tokens=48, max_grad_norm=1.0)
    sequences = make_sequences()
    reports = [updater.update(sequences, WeightedLogprobs(sequences), learning_rate=1e-3) for _ in range(3)]
    return reports, updater


def test_offloading_from_a_cpu_is_refused_where_a_cpu_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"training\.cpu_offload has no meaning on training\.device cpu"):
        TrainingConfig(device=Device.CPU, cpu_offload=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without CUDA")
def test_offloading_where_no_gpu_is_found_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    ranks = open_ranks(Device.AUTO, Precision.FLOAT32, cpu_offload=True)
    assert not ranks.offload
    assert ranks.mesh is None
    assert "training.cpu_offload makes no difference: there is no GPU" in caplog.text
