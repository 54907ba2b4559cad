"""Ranks that each diff their own shard publish the same version as if it were gathered whole."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from learner.training.config import Device, Precision
from learner.training.launch import RENDEZVOUS_VARIABLE
from learner.training.parallel import Ranks, open_ranks
from learner.training.publish import Publisher
from penstock.trajectory import PolicyVersion
from penstock.weights.manifest import Manifest
from penstock.weights.version_log import VersionLog
from tests.layouts import run_ranks

NUM_RANKS = 2
NUM_VERSIONS = 4


class OddShapes(nn.Module):
    """No number of rows is a multiple of the ranks'; one tensor has fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(837, 111))
        self.vector = nn.Parameter(torch.randn(501))
        self.short = nn.Parameter(torch.randn(1, 9))
        self.register_buffer("buffer", torch.randn(7))


class OnePolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.causal_lm = OddShapes()
        self.stage = None


def train(rank: int, folder: str) -> None:
    """Moves the weights a little, version by version; rank 0 compares what was published with the whole."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), LOCAL_RANK="0")
    os.environ[RENDEZVOUS_VARIABLE] = f"{folder}/rendezvous"
    torch.manual_seed(0)
    with ExitStack() as stack:
        ranks = open_ranks(Device.CPU, Precision.BFLOAT16)
        stack.callback(ranks.close)
        policy = OnePolicy()
        fully_shard(policy, mesh=ranks.mesh)
        pairs = [
            tuple(publisher(policy, ranks, precision, kind, stack) for kind in ("shards", "whole"))
            for precision in (Precision.BFLOAT16, Precision.FLOAT32)
        ]
        for step in range(NUM_VERSIONS):
            for by_shards, whole in pairs:
                by_shards.deltas_wanted = ranks.is_first
                compare(by_shards.write(PolicyVersion(1, step)), whole.write(PolicyVersion(1, step)), step)
            move(policy, step)


def publisher(policy: Any, ranks: Ranks, precision: Precision, kind: str, stack: ExitStack) -> Publisher:
    if not ranks.is_first:
        return Publisher(policy, ranks, None, precision)
    sink = VersionLog(name_prefix=f"penstock-test-{kind}-{precision}")
    stack.callback(sink.close)
    return Publisher(policy, ranks, sink, precision)


def compare(got: Manifest | None, expected: Manifest | None, step: int) -> None:
    if got is not None and expected is not None:
        assert got.digest == expected.digest
        assert len(got.deltas) == step, "each version but the first came as a delta"
        assert expected.deltas == ()


def move(policy: Any, step: int) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            shard = parameter.to_local()
            shard[shard.abs() < 0.02] *= 1.5
        policy.causal_lm.buffer[step] += 1


def test_each_rank_diffs_its_own_shard(tmp_path: Path) -> None:
    run_ranks(train, NUM_RANKS, str(tmp_path))
