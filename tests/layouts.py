"""Updates that must come out alike however the policy and the rows are laid out over ranks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from learner.algorithms.sums import Sums
from learner.training.launch import RENDEZVOUS_VARIABLE
from learner.training.packing import PackedRow, TokenSequence
from learner.training.parallel import Ranks, whole
from learner.training.policy import TokenScores
from learner.training.updater import Updater

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
_FORKED = multiprocessing.get_context("forkserver")
"""For processes that are ranks: forked from one that has imported, once, what takes them seven seconds."""
_FORKED.set_forkserver_preload(["learner.training.start"])
NUM_STEPS = 3
LENGTHS = (33, 30, 21, 17, 17, 9, 5, 3, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    num_replicas: int = 1
    context_ranks: int = 1
    tensor_ranks: int = 1
    pipeline_ranks: int = 1


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


def train(updater: Updater) -> dict[str, torch.Tensor]:
    """Losses, entropies and gradients of each step, scores before and after, and the weights at the end."""
    sequences = make_sequences()
    found = {"scores before": torch.from_numpy(np.concatenate(updater.score(sequences)))}
    gradients = {}

    def note(optimizer: torch.optim.Optimizer, *arguments: object) -> None:
        for name, parameter in updater.policy.named_parameters():
            if parameter.requires_grad:
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


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        scale = float(want.abs().max())
        # After the first step, Adam divides rounding errors by gradients that are near 0.
        tolerance = 1e-5 if name.startswith(("gradient", "report 0", "scores before")) else 1e-4
        assert float((found[name] - want).abs().max()) <= tolerance * scale, name


def run_ranks(target: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """target(rank, *arguments) in a process a rank. Fails if one of them does."""
    processes = [
        _FORKED.Process(target=_run_rank, args=(target, rank, num_ranks, arguments))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=400)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def _run_rank(target: Callable[..., None], rank: int, num_ranks: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK="0")
    target(rank, *arguments)


def meet_at(path: str) -> None:
    """Before each `open_ranks`: a file that no other meeting has used."""
    os.environ[RENDEZVOUS_VARIABLE] = path
