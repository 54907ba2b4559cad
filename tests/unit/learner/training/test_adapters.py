"""Adapters: only they are trained, kept and published, and what is published is the policy that was trained."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engines.tensors import unpack
from learner.training.adapter_folder import write_adapter_folder
from learner.training.adapters import add_adapters, without_adapters
from learner.training.algorithm_config import AlgorithmConfig
from learner.training.checkpoint import Checkpoints
from learner.training.checkpoint_reader import CheckpointReader
from learner.training.config import Device, LoraConfig, OptimizerConfig, Precision
from learner.training.folder import write_policy_folder
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.packing import TokenSequence
from learner.training.parallel import Ranks, open_ranks, place
from learner.training.policy_gradient import PolicyGradient
from learner.training.publish import full_tensors, trained_tensors
from learner.training.publish_adapters import AdapterPublisher
from learner.training.reference import Reference
from learner.training.updater import Snapshot, Updater
from penstock.errors import ConfigError, PenstockError
from penstock.trajectory import PolicyVersion
from penstock.weights.adapted_log import AdaptedLog
from penstock.weights.fetch import WeightFetcher
from tests.tiny_policy import write_tiny_policy
from tests.trainer_fakes import VERSION, make_batch

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
LORA = LoraConfig(rank=4)
RATE = 1e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def log() -> Iterator[AdaptedLog]:
    with closing(AdaptedLog(name_prefix="penstock-test-adapters")) as log:
        yield log


def make_updater(folder: Path, *, lora: LoraConfig | None = LORA, row_tokens: int = 64) -> Updater:
    policy = load_policy(folder, lora=lora)
    optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=RATE))
    return Updater(policy, optimizer, ONE_RANK, row_tokens=row_tokens, max_grad_norm=1.0)


def train(updater: Updater, *, steps: int = 2) -> None:
    recipe = AlgorithmConfig(kl="k3", kl_coefficient=0.1).recipe()  # type: ignore[arg-type]
    algorithm = PolicyGradient(updater, recipe, max_tokens=12, seed=0, reference=Reference(updater))
    for step in range(steps):
        assert algorithm.step(make_batch(step), VERSION, learning_rate=RATE).failure == ""


def sequences() -> list[TokenSequence]:
    return [TokenSequence(token_ids=t.token_ids, loss_mask=t.loss_mask) for t in make_batch().trajectories()]


def scores(updater: Updater) -> np.ndarray[Any, Any]:
    return np.concatenate(updater.score(sequences()))


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 33)[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits.float()
    return found


def test_a_policy_with_new_adapters_is_the_policy_without(folder: Path) -> None:
    updater, plain = make_updater(folder), make_updater(folder, lora=None)
    assert np.array_equal(scores(updater), scores(plain))
    train(updater)
    assert np.abs(scores(updater) - scores(plain)).max() > 1e-3


def test_only_adapters_are_trained(folder: Path) -> None:
    updater = make_updater(folder)
    frozen = {n: p.clone() for n, p in updater.policy.named_parameters() if not p.requires_grad}
    trained = [name for name, _ in trained_tensors(updater.policy)]
    assert len(trained) == 2 * 7 * 2, "A and B of the seven matrices of each of two layers"
    assert all(".lora_" in name for name in trained)
    train(updater)
    for name, parameter in updater.policy.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name]), name
    assert len(updater.optimizer.state) == len(trained)


def test_the_row_budget_changes_nothing(folder: Path) -> None:
    one, many = make_updater(folder, row_tokens=4096), make_updater(folder, row_tokens=16)
    train(one)
    train(many)
    for (name, got), (_, expected) in zip(
        trained_tensors(many.policy), trained_tensors(one.policy), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5, msg=name)


def test_the_reference_is_the_base_to_the_bit_and_holds_no_copy(folder: Path) -> None:
    updater = make_updater(folder)
    first, reference = scores(updater), Reference(updater)
    train(updater)
    after = scores(updater)
    assert np.array_equal(np.concatenate(reference.score(sequences())), first)
    assert np.array_equal(scores(updater), after), "the adapters are back"
    assert reference._weights == []


def test_a_snapshot_holds_the_adapters_alone_and_brings_them_back(folder: Path) -> None:
    updater = make_updater(folder)
    train(updater, steps=1)
    before, snapshot = scores(updater), Snapshot(updater)
    train(updater)
    snapshot.restore()
    assert np.array_equal(scores(updater), before)
    assert len(snapshot._parameters) == 28


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_published_scores_as_what_was_trained(tmp_path: Path, log: AdaptedLog, tied: bool) -> None:
    folder = write_tiny_policy(tmp_path, tied=tied)
    updater, plain = make_updater(folder), make_updater(folder, lora=None)
    publisher = AdapterPublisher(updater.policy, ONE_RANK, log, Precision.FLOAT32)
    for step in range(2):
        train(updater, steps=step + 1)
        manifest = publisher.write(PolicyVersion(1, step))
        assert manifest is not None
        staged = WeightFetcher().fetch(manifest, timeout_seconds=30)
        plain.policy.causal_lm.load_state_dict(unpack(staged), strict=False)
        assert np.abs(scores(plain) - scores(updater)).max() <= 1e-5
        assert set(unpack(staged)) == {name for name, _ in plain.policy.causal_lm.named_parameters()}


def test_a_base_in_half_precision_has_no_master_and_its_adapters_do(folder: Path, log: AdaptedLog) -> None:
    policy = load_policy(folder, lora=LORA)
    ranks = open_ranks(Device.CPU, Precision.BFLOAT16)
    try:
        place(policy, ranks, Precision.BFLOAT16)
        dtypes = {parameter.requires_grad: parameter.dtype for parameter in policy.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}
        optimizer = make_optimizer(policy, OptimizerConfig(learning_rate=RATE))
        updater = Updater(policy, optimizer, ranks, row_tokens=64, max_grad_norm=1.0)
        train(updater)
        manifest = AdapterPublisher(policy, ranks, log, Precision.BFLOAT16).write(PolicyVersion(1, 0))
        assert manifest is not None
        assert {entry.dtype for entry in manifest.tensors} == {"BF16"}
        plain = make_updater(folder, lora=None)
        weights = unpack(WeightFetcher().fetch(manifest, timeout_seconds=30))
        plain.policy.causal_lm.load_state_dict({n: t.float() for n, t in weights.items()}, strict=False)
        assert np.abs(scores(plain) - scores(updater)).mean() <= 0.02, "bfloat16 has 8 bits"
    finally:
        ranks.close()


def test_adapters_that_are_not_finite_are_not_published(folder: Path, log: AdaptedLog) -> None:
    updater = make_updater(folder)
    publisher = AdapterPublisher(updater.policy, ONE_RANK, log, Precision.FLOAT32)
    publisher.write(PolicyVersion(1, 0))
    with torch.no_grad():
        dict(trained_tensors(updater.policy))["model.layers.1.mlp.up_proj.lora_B.default.weight"].fill_(
            float("nan")
        )
    with pytest.raises(PenstockError, match=r"not published: 1 tensors are not finite.*up_proj"):
        publisher.write(PolicyVersion(1, 1))


def test_a_checkpoint_holds_adapters_and_their_optimiser_state_alone(tmp_path: Path, folder: Path) -> None:
    updater = make_updater(folder)
    train(updater)
    written = Checkpoints(tmp_path, updater, keep=1).write(2)
    with CheckpointReader(written.path) as reader:
        names = list(reader.tensors)
        assert reader.adapters == updater.policy.adapters
    assert all(".lora_" in name for name in names)
    assert len(names) == 28 * 4, "values, two moments, and Adam's step"
    train(updater, steps=1)
    resumed = make_updater(folder)
    assert Checkpoints(tmp_path, resumed, keep=1).resume() == 2
    train(resumed, steps=1)
    assert np.array_equal(scores(resumed), scores(updater))


def test_a_checkpoint_is_refused_on_another_base_and_by_other_settings(tmp_path: Path, folder: Path) -> None:
    Checkpoints(tmp_path, make_updater(folder), keep=1).write(1)
    other = write_tiny_policy(tmp_path / "other", seed=1)
    for policy, lora, message in (
        (other, LORA, "adapters of other weights"),
        (folder, LoraConfig(rank=4, alpha=1.0), "rank 4, scale 2, but the run trains .*rank 4, scale 0.25"),
        (folder, None, "but the run trains all weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            Checkpoints(tmp_path, make_updater(policy, lora=lora), keep=1).resume()


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "layers.1.mlp.up_proj")])
def test_exports_as_adapters_and_merged_have_the_trained_policys_logits(
    tmp_path: Path, folder: Path, targets: tuple[str, ...]
) -> None:
    updater = make_updater(folder, lora=LoraConfig(rank=4, alpha=6.0, target_modules=targets))
    train(updater)
    policy = updater.policy
    assert policy.adapters is not None
    write_policy_folder(
        tmp_path / "merged", full_tensors(policy, ONE_RANK), source=folder, precision=Precision.FLOAT32
    )
    write_adapter_folder(
        tmp_path / "adapter", dict(trained_tensors(policy)), policy.adapters, source=folder,
        precision=Precision.FLOAT32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first = logits(base)
    with_adapter = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    policy.causal_lm.set_attn_implementation("sdpa")
    trained = logits(policy.causal_lm)
    assert float((trained - first).abs().max()) > 1e-2
    torch.testing.assert_close(with_adapter, trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-5)


def test_every_rank_begins_with_the_same_adapters(folder: Path) -> None:
    torch.manual_seed(1)
    one = dict(trained_tensors(load_policy(folder, lora=LORA, seed=3)))
    torch.manual_seed(2)
    other = dict(trained_tensors(load_policy(folder, lora=LORA, seed=3)))
    another = dict(trained_tensors(load_policy(folder, lora=LORA, seed=4)))
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(one[name], other[name])
    assert not torch.equal(one[name], another[name])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("qproj", "'qproj', which is no layer; expected linear layers of the policy: down_proj, gate_proj"),
        ("embed_tokens", "is a Embedding, or gives the logits"),
        ("lm_head", "is a Linear, or gives the logits"),
    ],
)
def test_a_target_that_gets_no_adapter_is_refused(folder: Path, target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(folder, lora=LoraConfig(rank=2, target_modules=("q_proj", target)))


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importer = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return importer(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"peft is not installed; `pip install 'penstock\[lora\]'`"):
        add_adapters(None, LORA, base_digest="", seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank is -1"),
        ({"alpha": 8.0}, "no effect while lora.rank is 0"),
        ({"target_modules": ("q_proj",)}, "no effect while lora.rank is 0"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha is 0.0; expected more than 0"),
        ({"rank": 2, "target_modules": ()}, "lora.target_modules is empty"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


def test_an_error_while_the_adapters_are_off_leaves_them_on(folder: Path) -> None:
    updater = make_updater(folder)
    train(updater)
    before = scores(updater)
    with pytest.raises(ValueError, match="on purpose"), without_adapters(updater.policy):
        raise ValueError("on purpose")
    assert np.array_equal(scores(updater), before)
