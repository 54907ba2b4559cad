"""Ranks that have consecutive blocks of a policy: losses, gradients, versions and checkpoints are those of one rank."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from learner.training.checkpoint import Checkpoints
from learner.training.checkpoint_reader import CheckpointReader
from learner.training.config import Device, LoraConfig, OptimizerConfig, Precision, TrainingConfig
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.parallel import Ranks, open_ranks, place
from learner.training.publish import Publisher
from learner.training.reference import Reference
from learner.training.scalar import load_scalar_model
from learner.training.updater import Updater
from penstock.errors import ConfigError, PenstockError
from penstock.trajectory import PolicyVersion
from penstock.weights.version_log import VersionLog
from tests.layouts import ONE_RANK, Layout, assert_alike, make_sequences, meet_at, run_ranks, train
from tests.tiny_policy import SIZES, write_family

DEEP = SIZES | {"num_hidden_layers": 5}
FAMILIES: dict[str, PreTrainedConfig] = {
    "untied": LlamaConfig(**DEEP, attention_bias=True, pad_token_id=4),
    "tied": Qwen3Config(**DEEP, tie_word_embeddings=True, head_dim=8),
}
TWO, FOUR = Layout(pipeline_ranks=2), Layout(pipeline_ranks=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    layout: Layout = field(default_factory=lambda: TWO)
    family: str = "tied"
    max_grad_norm: float = 1e6
    activation_checkpointing: bool = False
    row_tokens: int = 24
    precision: Precision = Precision.FLOAT32


ON_TWO_RANKS = {
    "tied": Case(),
    "untied": Case(family="untied"),
    "clipped": Case(max_grad_norm=0.05),
    "one row": Case(row_tokens=4096),
    "checkpointing": Case(activation_checkpointing=True),
    "half": Case(precision=Precision.BFLOAT16),
}
ON_FOUR_RANKS = {
    "four stages": Case(layout=FOUR),
    "four untied stages": Case(layout=FOUR, family="untied"),
    "shards": Case(),
    "replicas": Case(layout=dataclasses.replace(TWO, num_replicas=2), family="untied"),
    "context": Case(layout=dataclasses.replace(TWO, context_ranks=2)),
}


def make_updater(folder: Path, ranks: Ranks, case: Case) -> Updater:
    policy = load_policy(
        folder / case.family,
        activation_checkpointing=case.activation_checkpointing,
        deferred=ranks.world_size > 1,
    )
    place(policy, ranks, case.precision)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=1e-3))
    return Updater(policy, optimizer, ranks, row_tokens=case.row_tokens, max_grad_norm=case.max_grad_norm)


def digest(updater: Updater) -> str:
    """Of the version that the ranks publish; empty on all but the first."""
    name = f"penstock-test-pipeline-{updater.ranks.world_size}"
    with ExitStack() as stack:
        is_first = updater.ranks.is_first
        sink = stack.enter_context(closing(VersionLog(name_prefix=name))) if is_first else None
        manifest = Publisher(updater.policy, updater.ranks, sink, Precision.BFLOAT16).write(
            PolicyVersion(1, 0)
        )
        return "" if manifest is None else manifest.digest


def open_layout(folder: str, name: str, layout: Layout, stack: ExitStack) -> Ranks:
    meet_at(f"{folder}/{name}.rendezvous")
    ranks = open_ranks(Device.CPU, Precision.FLOAT32, **dataclasses.asdict(layout))
    stack.callback(ranks.close)
    return ranks


def train_cases(rank: int, folder: str, cases: dict[str, Case]) -> None:
    """On each rank; the first of each stage writes what it found."""
    for name, case in cases.items():
        with ExitStack() as stack:
            ranks = open_layout(folder, name, case.layout, stack)
            updater = make_updater(Path(folder), ranks, case)
            assert sum(p.numel() for p in updater.policy.parameters()) < whole_size(folder, case)
            found = train(updater)
            published = digest(updater)
            Checkpoints(Path(folder) / f"{name}.checkpoints", updater, keep=1).write(3)
            if rank == ranks.of_stage.start:
                save_file(found, f"{folder}/{name}-{rank}.safetensors")
            if rank == 0:
                Path(f"{folder}/{name}.digest").write_text(published)


def whole_size(folder: str, case: Case) -> int:
    return sum(p.numel() for p in load_policy(Path(folder) / case.family).parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    for name, config in FAMILIES.items():
        write_family(folder / name, config)
    run_ranks(train_cases, 2, str(folder), ON_TWO_RANKS)
    return folder


def assert_as_one_rank(folder: Path, name: str, case: Case) -> None:
    alone = make_updater(folder, ONE_RANK, case)
    expected = train(alone)
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        part = load_file(path)
        for key in found.keys() & part.keys():
            assert torch.equal(part[key], found[key]), key  # every rank is told the same, tied gradients too
        found |= part
    if case.precision is Precision.FLOAT32:
        assert_alike(found, expected)
    for report in ("report 0", "report 2"):
        torch.testing.assert_close(found[report], expected[report], rtol=3e-2, atol=3e-2)
    resumed = make_updater(folder, ONE_RANK, dataclasses.replace(case, precision=Precision.FLOAT32))
    assert Checkpoints(folder / f"{name}.checkpoints", resumed, keep=1).resume() == 3
    assert (folder / f"{name}.digest").read_text() == digest(resumed)


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_stages_find_what_one_rank_does(folder: Path, name: str) -> None:
    assert_as_one_rank(folder, name, ON_TWO_RANKS[name])


@pytest.mark.slow
def test_stages_of_several_ranks_and_more_stages_find_what_one_rank_does(folder: Path) -> None:
    run_ranks(train_cases, 4, str(folder), ON_FOUR_RANKS)
    for name, case in ON_FOUR_RANKS.items():
        assert_as_one_rank(folder, name, case)


def copy_checkpoint(folder: Path, ranks: Ranks, written: str, copied: str) -> None:
    updater = make_updater(folder, ranks, Case())
    assert Checkpoints(folder / written, updater, keep=1).resume() == 3
    Checkpoints(folder / copied, updater, keep=1).write(3)


def copy_in_layouts(rank: int, folder: str) -> None:
    for layout, written, copied in (
        (Layout(), "tied.checkpoints", "sharded"),
        (TWO, "sharded", "stages again"),
    ):
        with ExitStack() as stack:
            copy_checkpoint(Path(folder), open_layout(folder, copied, layout, stack), written, copied)


def test_a_checkpoint_goes_from_stages_to_one_rank_and_to_shards_and_back(folder: Path) -> None:
    copy_checkpoint(folder, ONE_RANK, "tied.checkpoints", "whole")
    run_ranks(copy_in_layouts, 2, str(folder))
    with CheckpointReader(folder / "tied.checkpoints" / "step-00000003") as stages:
        for name in ("whole", "sharded", "stages again"):
            with CheckpointReader(folder / name / "step-00000003") as copy:
                assert copy.tensors.keys() == stages.tensors.keys()
                for tensor in stages.tensors:
                    assert torch.equal(copy.full(tensor), stages.full(tensor)), (name, tensor)


def spoil_and_publish(rank: int, folder: str) -> None:
    """What is not finite is on the last stage only; every rank hears of it."""
    with ExitStack() as stack:
        ranks = open_layout(folder, "spoilt", TWO, stack)
        updater = make_updater(Path(folder), ranks, Case())
        before = Reference(updater).score(make_sequences())
        if rank == 1:
            with torch.no_grad():
                updater.policy.causal_lm.model.norm.weight.to_local().fill_(torch.nan)
        with pytest.raises(PenstockError, match=r"1 tensors are not finite, such as model\.norm\.weight"):
            digest(updater)
        assert all(len(scores) == s.num_sampled for scores, s in zip(before, make_sequences(), strict=True))
        tied = Path(folder) / "tied"
        for policy in (load_scalar_model(tied), load_policy(tied, lora=LoraConfig(rank=2))):
            with pytest.raises(ConfigError, match="a critic, a policy with adapters"):
                place(policy, ranks, Precision.FLOAT32)


def test_weights_that_are_not_finite_on_one_stage_are_told_on_all_and_other_models_refused(
    folder: Path,
) -> None:
    run_ranks(spoil_and_publish, 2, str(folder))


def refuse_too_many(rank: int, folder: str) -> None:
    with ExitStack() as stack:
        ranks = open_layout(folder, "too many", Layout(pipeline_ranks=2), stack)
        with pytest.raises(ConfigError, match="the policy has 1 blocks; expected at most a rank a block"):
            place(load_policy(Path(folder) / "small"), ranks, Precision.FLOAT32)


def test_more_stages_than_blocks_are_refused(tmp_path: Path) -> None:
    write_family(tmp_path / "small", LlamaConfig(**SIZES | {"num_hidden_layers": 1}))
    run_ranks(refuse_too_many, 2, str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"pipeline_ranks": 3},
            r"training\.pipeline_ranks is 3; expected a divisor of num_ranks, which is 4",
        ),
        (
            {"pipeline_ranks": 4, "num_replicas": 2},
            "num_replicas is 2 and tensor_ranks 1 and pipeline_ranks 4; expected a product",
        ),
        ({"pipeline_ranks": 2, "tensor_ranks": 2}, "stages divide neither matrices nor adapters"),
        ({"pipeline_ranks": 2, "lora": LoraConfig(rank=2)}, "stages divide neither matrices nor adapters"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        TrainingConfig(num_ranks=4, **settings)
