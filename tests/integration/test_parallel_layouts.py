"""However the policy and the rows are laid out over ranks, losses and gradients are those of one rank."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.algorithms.sums import Sums
from learner.training.checkpoint import Checkpoints
from learner.training.config import Device, OptimizerConfig, Precision, TrainingConfig
from learner.training.launch import RENDEZVOUS_VARIABLE
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.packing import PackedRow, TokenSequence
from learner.training.parallel import Ranks, open_ranks, place, whole
from learner.training.policy import Policy, RowForm, TokenScores
from learner.training.updater import Updater
from penstock.errors import ConfigError
from tests.tiny_policy import write_tiny_policy

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
NUM_STEPS = 3
LENGTHS = (33, 30, 21, 17, 17, 9, 5, 3, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    num_replicas: int = 1
    context_ranks: int = 1


SHARDS = Layout()
CONTEXT = Layout(context_ranks=2)
REPLICAS = Layout(num_replicas=2)
BOTH = Layout(num_replicas=2, context_ranks=4)


class WeightedLogprobs:
    """Each sampled token's log-probability times a weight of its own, and its entropy as a sum."""

    def __init__(self, sequences: list[TokenSequence]) -> None:
        generator = np.random.default_rng(1)
        self._weights = [generator.normal(size=s.num_sampled).astype(np.float32) for s in sequences]

    def __call__(self, row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
        loss = (scores.logprobs_S * row.gather(self._weights)).sum() / 50
        return loss, {"entropy_sum": scores.entropy_S.sum()}


def make_sequences() -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    sequences = []
    for length in LENGTHS:
        loss_mask = (np.arange(length) >= length // 3).astype(np.uint8)
        token_ids = generator.integers(3, 40, length).astype(np.int32)
        sequences.append(TokenSequence(token_ids=token_ids, loss_mask=loss_mask))
    return sequences


def make_updater(folder: Path, ranks: Ranks, *, row_tokens: int = 48, padded: bool = False) -> Updater:
    policy = load_policy(folder)
    if padded:
        policy.causal_lm.set_attn_implementation("sdpa")
        policy = Policy(policy.causal_lm, dataclasses.replace(policy.evaluation, form=RowForm.PADDED))
    place(policy, ranks, Precision.FLOAT32)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3))
    return Updater(policy, optimizer, ranks, row_tokens=row_tokens, max_grad_norm=1e6)


def train(updater: Updater) -> dict[str, torch.Tensor]:
    """Losses, entropies and gradients of each step, scores before and after, and the weights at the end."""
    sequences = make_sequences()
    found = {"scores before": torch.from_numpy(np.concatenate(updater.score(sequences)))}
    gradients = {}

    def note(optimizer: torch.optim.Optimizer, *arguments: object) -> None:
        for name, parameter in updater.policy.named_parameters():
            assert parameter.grad is not None
            gradients[name] = whole(parameter.grad).clone()

    updater.optimizer.register_step_pre_hook(note)
    for step in range(NUM_STEPS):
        report = updater.update(sequences, WeightedLogprobs(sequences), learning_rate=1e-3)
        values = [report.loss, report.grad_norm, report.sums["entropy_sum"]]
        found[f"report {step}"] = torch.tensor(values, dtype=torch.float64)
        if step == 0:
            found |= {f"gradient {name}": gradient for name, gradient in gradients.items()}
    found["scores after"] = torch.from_numpy(np.concatenate(updater.score(sequences)))
    return found


def train_rank(rank: int, num_ranks: int, folder: str, layouts: dict[str, Layout]) -> None:
    """In a process of its own: every layout in turn; rank 0 writes what it found."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK="0")
    for name, layout in layouts.items():
        os.environ[RENDEZVOUS_VARIABLE] = f"{folder}/{name}.rendezvous"
        with ExitStack() as stack:
            ranks = open_ranks(Device.CPU, Precision.FLOAT32, **dataclasses.asdict(layout))
            stack.callback(ranks.close)
            updater = make_updater(Path(folder) / "policy", ranks)
            found = train(updater)
            Checkpoints(Path(folder) / f"{name}.checkpoints", updater, keep=1).write(NUM_STEPS)
            if rank == 0:
                save_file(found, f"{folder}/{name}.safetensors")


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        scale = float(want.abs().max())
        # After the first step, Adam divides rounding errors by gradients that are near 0.
        tolerance = 1e-5 if name.startswith(("gradient", "report 0", "scores before")) else 1e-4
        assert float((found[name] - want).abs().max()) <= tolerance * scale, name


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


def run_layouts(folder: Path, num_ranks: int, layouts: dict[str, Layout]) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=train_rank, args=(rank, num_ranks, str(folder), layouts))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=300)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def assert_layouts_alike(folder: Path, num_ranks: int, layouts: dict[str, Layout]) -> None:
    run_layouts(folder, num_ranks, layouts)
    expected = load_file(folder / "one.safetensors")
    for name in layouts:
        assert_alike(load_file(folder / f"{name}.safetensors"), expected)
        resumed = make_updater(folder / "policy", ONE_RANK)
        assert Checkpoints(folder / f"{name}.checkpoints", resumed, keep=1).resume() == NUM_STEPS
        after = torch.from_numpy(np.concatenate(resumed.score(make_sequences())))
        torch.testing.assert_close(after, expected["scores after"], rtol=0, atol=1e-3)


def test_two_ranks_find_the_same_by_shards_and_by_context(folder: Path) -> None:
    assert_layouts_alike(folder, 2, {"two shards": SHARDS, "two contexts": CONTEXT})


def test_four_ranks_find_the_same_in_two_replicas_of_two_shards(folder: Path) -> None:
    assert_layouts_alike(folder, 4, {"replicas": REPLICAS})


@pytest.mark.slow
def test_four_ranks_find_the_same_in_every_other_layout(folder: Path) -> None:
    layouts = {"four shards": SHARDS, "context pairs": CONTEXT, "both": BOTH}
    assert_layouts_alike(folder, 4, layouts)


@pytest.mark.parametrize("name", ["num_replicas", "context_ranks"])
def test_a_layout_that_does_not_divide_the_ranks_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"training.{name} is 3; expected a divisor of num_ranks, which is 4"
    ):
        TrainingConfig(num_ranks=4, **{name: 3})
