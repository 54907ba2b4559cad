"""Ranks that share each matrix of a policy: every family, adapters, a critic, clipping, versions, checkpoints."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from learner.training.checkpoint import Checkpoints
from learner.training.checkpoint_reader import CheckpointReader
from learner.training.config import Device, LoraConfig, OptimizerConfig, Precision
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.parallel import Ranks, open_ranks, place
from learner.training.publish import Publisher
from learner.training.scalar import load_scalar_model
from learner.training.updater import Updater
from penstock.errors import ConfigError
from penstock.trajectory import PolicyVersion
from penstock.weights.version_log import VersionLog
from tests.layouts import ONE_RANK, assert_alike, meet_at, run_ranks, train
from tests.tiny_policy import SIZES, write_family

FAMILIES = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, pad_token_id=4),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True, pad_token_id=30),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True, head_dim=8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    family: str = "qwen3"
    lora: LoraConfig = field(default_factory=LoraConfig)
    is_critic: bool = False
    max_grad_norm: float = 1e6
    activation_checkpointing: bool = False
    precision: Precision = Precision.FLOAT32


CASES = {
    **{name: Case(family=name) for name in FAMILIES},
    "clipped": Case(max_grad_norm=0.05),
    "adapters": Case(lora=LoraConfig(rank=3)),
    "some adapters": Case(family="llama", lora=LoraConfig(rank=3, target_modules=("q_proj", "down_proj"))),
    "critic": Case(is_critic=True),
    "checkpointing": Case(activation_checkpointing=True),
    "half": Case(precision=Precision.BFLOAT16),
    "half adapters": Case(precision=Precision.BFLOAT16, lora=LoraConfig(rank=3)),
}


def make_updater(folder: Path, ranks: Ranks, case: Case, precision: Precision = Precision.FLOAT32) -> Updater:
    load = load_scalar_model if case.is_critic else load_policy
    policy = load(
        folder / case.family,
        lora=case.lora,
        activation_checkpointing=case.activation_checkpointing,
        deferred=ranks.world_size > 1,
    )
    if case.is_critic:
        torch.nn.init.normal_(policy.causal_lm.score.weight, generator=torch.Generator().manual_seed(0))
    place(policy, ranks, precision)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3))
    return Updater(policy, optimizer, ranks, row_tokens=48, max_grad_norm=case.max_grad_norm)


def digest(updater: Updater, precision: Precision) -> str:
    """Of the version that the ranks publish; empty on all but the first."""
    name = f"penstock-test-tensor-{updater.ranks.world_size}"
    with ExitStack() as stack:
        is_first = updater.ranks.is_first
        sink = stack.enter_context(closing(VersionLog(name_prefix=name))) if is_first else None
        manifest = Publisher(updater.policy, updater.ranks, sink, precision).write(PolicyVersion(1, 0))
        return "" if manifest is None else manifest.digest


def train_cases(rank: int, folder: str, cases: dict[str, Case]) -> None:
    """On each of two ranks; rank 0 writes what it found."""
    for name, case in cases.items():
        with ExitStack() as stack:
            ranks = open_pair(folder, name, tensor_ranks=2, stack=stack)
            updater = make_updater(Path(folder), ranks, case, case.precision)
            published = digest(updater, Precision.BFLOAT16)
            found = train(updater)
            if name == "llama":
                Checkpoints(Path(folder) / "divided", updater, keep=1).write(3)
            if rank == 0:
                save_file(found, f"{folder}/{name}.safetensors", metadata={"digest": published})
                Path(f"{folder}/{name}.digest").write_text(published)
    for layout, written, copied in ((1, "divided", "sharded"), (2, "sharded", "divided again")):
        with ExitStack() as stack:
            ranks = open_pair(folder, copied, tensor_ranks=layout, stack=stack)
            copy_checkpoint(Path(folder), ranks, written, copied)


def open_pair(folder: str, name: str, *, tensor_ranks: int, stack: ExitStack) -> Ranks:
    meet_at(f"{folder}/{name}.rendezvous")
    ranks = open_ranks(Device.CPU, Precision.FLOAT32, tensor_ranks=tensor_ranks)
    stack.callback(ranks.close)
    return ranks


def copy_checkpoint(folder: Path, ranks: Ranks, written: str, copied: str) -> None:
    updater = make_updater(folder, ranks, CASES["llama"])
    assert Checkpoints(folder / written, updater, keep=1).resume() == 3
    Checkpoints(folder / copied, updater, keep=1).write(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor")
    for name, config in FAMILIES.items():
        write_family(folder / name, config)
    run_ranks(train_cases, 2, str(folder), CASES)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_matrices_find_what_one_does(folder: Path, name: str) -> None:
    alone = make_updater(folder, ONE_RANK, CASES[name])
    assert (folder / f"{name}.digest").read_text() == digest(alone, Precision.BFLOAT16)
    found, expected = load_file(folder / f"{name}.safetensors"), train(alone)
    if CASES[name].precision is Precision.FLOAT32:
        assert_alike(found, expected)
    for report in ("report 0", "report 2"):
        torch.testing.assert_close(found[report], expected[report], rtol=3e-2, atol=3e-2)


def test_a_checkpoint_goes_from_shared_matrices_to_one_rank_and_to_shards_and_back(folder: Path) -> None:
    copy_checkpoint(folder, ONE_RANK, "divided", "whole")
    with CheckpointReader(folder / "divided" / "step-00000003") as divided:
        assert any("columns" in entry for entry in divided.tensors.values())
        for name in ("whole", "sharded", "divided again"):
            with CheckpointReader(folder / name / "step-00000003") as copy:
                assert copy.tensors.keys() == divided.tensors.keys()
                for tensor in divided.tensors:
                    assert torch.equal(copy.full(tensor), divided.full(tensor)), (name, tensor)


def refuse(rank: int, folder: str) -> None:
    """Two ranks that share matrices; each sees the same error."""
    with ExitStack() as stack:
        ranks = open_pair(folder, "refused", tensor_ranks=2, stack=stack)
        for name, reason in (
            (
                "gpt2",
                "a policy of type gpt2 cannot be divided so; expected one of llama, mistral, qwen2, qwen3",
            ),
            ("odd", "does not divide the policy's num_key_value_heads, 1; expected a divisor"),
        ):
            with pytest.raises(ConfigError, match=reason):
                place(load_policy(Path(folder) / name), ranks, Precision.FLOAT32)


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    gpt2 = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1)
    write_family(tmp_path / "gpt2", gpt2)
    write_family(tmp_path / "odd", LlamaConfig(**SIZES | {"num_key_value_heads": 1}))
    run_ranks(refuse, 2, str(tmp_path))
