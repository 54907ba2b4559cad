"""However the policy and the rows are laid out over ranks, losses and gradients are those of one rank."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.training.checkpoint import Checkpoints
from learner.training.config import Device, OptimizerConfig, Precision, TrainingConfig
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.parallel import Ranks, open_ranks, place
from learner.training.policy import Policy, RowForm
from learner.training.updater import Updater
from penstock.errors import ConfigError
from tests.layouts import (
    NUM_STEPS,
    ONE_RANK,
    Layout,
    assert_alike,
    make_sequences,
    meet_at,
    run_ranks,
    train,
)
from tests.tiny_policy import write_tiny_policy

SHARDS = Layout()
CONTEXT = Layout(context_ranks=2)
REPLICAS = Layout(num_replicas=2)
BOTH = Layout(num_replicas=2, context_ranks=4)
TENSOR = Layout(tensor_ranks=2)
TENSOR_AND_CONTEXT = Layout(tensor_ranks=2, context_ranks=2)
TENSOR_AND_REPLICAS = Layout(tensor_ranks=2, num_replicas=2)


def make_updater(folder: Path, ranks: Ranks, *, row_tokens: int = 48, padded: bool = False) -> Updater:
    policy = load_policy(folder, deferred=ranks.world_size > 1)
    if padded:
        policy.causal_lm.set_attn_implementation("sdpa")
        policy = Policy(policy.causal_lm, dataclasses.replace(policy.evaluation, form=RowForm.PADDED))
    place(policy, ranks, Precision.FLOAT32)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3))
    return Updater(policy, optimizer, ranks, row_tokens=row_tokens, max_grad_norm=1e6)


def train_layouts(rank: int, folder: str, layouts: dict[str, Layout]) -> None:
    """On each rank: every layout in turn; rank 0 writes what it found."""
    for name, layout in layouts.items():
        meet_at(f"{folder}/{name}.rendezvous")
        with ExitStack() as stack:
            ranks = open_ranks(Device.CPU, Precision.FLOAT32, **dataclasses.asdict(layout))
            stack.callback(ranks.close)
            updater = make_updater(Path(folder) / "policy", ranks)
            found = train(updater)
            Checkpoints(Path(folder) / f"{name}.checkpoints", updater, keep=1).write(NUM_STEPS)
            if rank == 0:
                save_file(found, f"{folder}/{name}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_tiny_policy(folder / "policy")
    save_file(train(make_updater(folder / "policy", ONE_RANK)), folder / "one.safetensors")
    return folder


@pytest.mark.parametrize(
    "options",
    [{"padded": True}, {"row_tokens": 16}, {"row_tokens": 4096}],
    ids=["padded", "many rows", "one row"],
)
def test_one_rank_finds_the_same_however_it_lays_out_rows(folder: Path, options: dict[str, int]) -> None:
    found = train(make_updater(folder / "policy", ONE_RANK, **options))
    assert_alike(found, load_file(folder / "one.safetensors"))


def assert_layouts_alike(folder: Path, num_ranks: int, layouts: dict[str, Layout]) -> None:
    run_ranks(train_layouts, num_ranks, str(folder), layouts)
    expected = load_file(folder / "one.safetensors")
    for name in layouts:
        assert_alike(load_file(folder / f"{name}.safetensors"), expected)
        resumed = make_updater(folder / "policy", ONE_RANK)
        assert Checkpoints(folder / f"{name}.checkpoints", resumed, keep=1).resume() == NUM_STEPS
        after = torch.from_numpy(np.concatenate(resumed.score(make_sequences())))
        torch.testing.assert_close(after, expected["scores after"], rtol=0, atol=1e-3)


def test_two_ranks_find_the_same_by_shards_by_context_and_by_shared_matrices(folder: Path) -> None:
    assert_layouts_alike(folder, 2, {"two shards": SHARDS, "two contexts": CONTEXT, "tensor": TENSOR})


@pytest.mark.slow
def test_four_ranks_find_the_same_in_replicas_and_with_shared_matrices(folder: Path) -> None:
    layouts = {"replicas": REPLICAS, "tensor and shards": TENSOR, "tensor and context": TENSOR_AND_CONTEXT}
    assert_layouts_alike(folder, 4, layouts)


@pytest.mark.slow
def test_four_ranks_find_the_same_in_every_other_layout(folder: Path) -> None:
    layouts = {"four shards": SHARDS, "context pairs": CONTEXT, "both": BOTH}
    layouts["tensor and replicas"] = TENSOR_AND_REPLICAS
    assert_layouts_alike(folder, 4, layouts)


@pytest.mark.parametrize("name", ["num_replicas", "context_ranks", "tensor_ranks"])
def test_a_layout_that_does_not_divide_the_ranks_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"training.{name} is 3; expected a divisor of num_ranks, which is 4"
    ):
        TrainingConfig(num_ranks=4, **{name: 3})


def test_shared_matrices_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"training\.compile is on and tensor_ranks 2"):
        TrainingConfig(num_ranks=2, tensor_ranks=2, compile=True)


@pytest.mark.parametrize("name", ["num_replicas", "context_ranks"])
def test_layouts_that_divide_the_ranks_only_one_by_one_are_refused(name: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"training.{name} is 4 and tensor_ranks 2; expected a product that divides num_ranks",
    ):
        TrainingConfig(num_ranks=4, tensor_ranks=2, **{name: 4})
