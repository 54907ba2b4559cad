"""Adapters on several ranks: trained, published and kept as on one."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.engines.tensors import unpack
from learner.algorithms.sums import Sums
from learner.training.checkpoint import Checkpoints
from learner.training.config import Device, LoraConfig, OptimizerConfig, Precision
from learner.training.launch import RENDEZVOUS_VARIABLE
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.packing import PackedRow, TokenSequence
from learner.training.parallel import Ranks, open_ranks, place
from learner.training.policy import TokenScores
from learner.training.publish_adapters import AdapterPublisher
from learner.training.reference import Reference
from learner.training.updater import Updater
from penstock.trajectory import PolicyVersion
from penstock.weights.adapted_log import AdaptedLog
from penstock.weights.fetch import WeightFetcher
from tests.layouts import run_ranks
from tests.tiny_policy import write_tiny_policy

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
NUM_STEPS = 3


def make_updater(folder: Path, ranks: Ranks, precision: Precision = Precision.FLOAT32) -> Updater:
    policy = load_policy(folder / "policy", lora=LoraConfig(rank=3))
    place(policy, ranks, precision)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-2))
    return Updater(policy, optimizer, ranks, row_tokens=48, max_grad_norm=1.0)


def sequences() -> list[TokenSequence]:
    draw = np.random.default_rng(0)
    return [
        TokenSequence(
            token_ids=draw.integers(3, 40, length).astype(np.int32),
            loss_mask=(np.arange(length) >= length // 3).astype(np.uint8),
        )
        for length in (33, 21, 17, 9, 5, 2)
    ]


def likelihood(row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
    return -scores.logprobs_S.sum() / 50, {}


def train(updater: Updater, log: AdaptedLog | None, precision: Precision) -> dict[str, torch.Tensor]:
    """Scores of the policy and of its reference after some steps, and on rank 0 the published weights."""
    reference = Reference(updater)
    publisher = AdapterPublisher(updater.policy, updater.ranks, log, precision)
    for step in range(NUM_STEPS):
        publisher.write(PolicyVersion(1, step))
        updater.update(sequences(), likelihood, learning_rate=1e-2)
    found = {
        "reference": torch.from_numpy(np.concatenate(reference.score(sequences()))),
        "scores": torch.from_numpy(np.concatenate(updater.score(sequences()))),
    }
    manifest = publisher.write(PolicyVersion(1, NUM_STEPS))
    if manifest is not None:
        with closing(WeightFetcher()) as fetcher:
            found |= unpack(fetcher.fetch(manifest, timeout_seconds=60))
    return {name: tensor.clone() for name, tensor in found.items()}


def train_rank(rank: int, num_ranks: int, folder: str) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK="0")
    for precision in Precision:
        os.environ[RENDEZVOUS_VARIABLE] = f"{folder}/{precision}.rendezvous"
        with ExitStack() as stack:
            ranks = open_ranks(Device.CPU, precision)
            stack.callback(ranks.close)
            log = stack.enter_context(closing(AdaptedLog(name_prefix=f"penstock-test-ranks-{os.getpid()}")))
            updater = make_updater(Path(folder), ranks, precision)
            found = train(updater, log if rank == 0 else None, precision)
            Checkpoints(Path(folder) / f"{precision}.checkpoints", updater, keep=1).write(NUM_STEPS)
            if rank == 0:
                save_file(found, f"{folder}/{precision}.safetensors")


@pytest.mark.slow
def test_two_ranks_train_publish_and_keep_what_one_does(tmp_path: Path) -> None:
    write_tiny_policy(tmp_path / "policy")
    run_ranks(train_rank, 2, 2, str(tmp_path))
    with closing(AdaptedLog(name_prefix="penstock-test-one-rank")) as log:
        expected = train(make_updater(tmp_path, ONE_RANK), log, Precision.FLOAT32)
    for precision, tolerance in ((Precision.FLOAT32, 1e-4), (Precision.BFLOAT16, 5e-2)):
        found = load_file(tmp_path / f"{precision}.safetensors")
        assert found.keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(found[name].float(), want, rtol=0, atol=tolerance, msg=name)
    resumed = make_updater(tmp_path, ONE_RANK)
    assert Checkpoints(tmp_path / "float32.checkpoints", resumed, keep=1).resume() == NUM_STEPS
    after = torch.from_numpy(np.concatenate(resumed.score(sequences())))
    torch.testing.assert_close(after, expected["scores"], rtol=0, atol=1e-4)
