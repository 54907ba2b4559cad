"""What is the torch engine's own: starting, faults, dtypes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, Gemma2Config

from actors.engines.policy import load_architecture
from actors.engines.torch import TorchEngine
from penstock.errors import ConfigError, EngineFault, WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.staged import StagedWeights, stage
from tests.conformance.engine_suite import complete, prompt, request
from tests.conformance.policies import Policy, configs, host_tensors, write_policy
from tests.tiny_policy import EOS_ID, write_tiny_policy

FIRST = PolicyVersion(1, 0)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return write_policy(tmp_path / "policy", configs()["qwen3-tied"])


def in_bfloat16(policy: Policy, version: PolicyVersion) -> StagedWeights:
    tensors = []
    for tensor in host_tensors(policy.model):
        values = torch.from_numpy(tensor.data).view(torch.float32).bfloat16()
        tensors.append(dataclasses.replace(tensor, dtype="BF16", data=values.view(torch.uint8).numpy()))
    return stage(version, tensors)


async def test_an_engine_starts_installs_generates_and_stops(policy: Policy) -> None:
    engine = TorchEngine(policy.folder, num_slots=2)
    await engine.start()
    report = await engine.install(policy.stage(FIRST))
    done = await complete(engine, request(prompt(4), max_tokens=3))
    await engine.stop()
    assert len(done.token_ids) == 3
    assert report.pause_seconds >= 0
    assert (engine.num_slots, engine.max_context) == (2, 512)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_slots": 0}, "num_slots is 0"),
        ({"max_context": 1}, "expected 2 to 512"),
        ({"max_context": 513}, "expected 2 to 512"),
        ({"device": "abacus"}, "device 'abacus'"),
    ],
)
def test_settings_that_cannot_be_are_refused(policy: Policy, settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TorchEngine(policy.folder, **settings)


def test_a_folder_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        TorchEngine(tmp_path)
    for text in ("not json", "{}", '{"model_type": "unheard-of"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="cannot be used"):
            TorchEngine(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8,
        ),
        BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2),
    ],
    ids=["soft-capped attention", "attention of its own"],
)  # fmt: skip
async def test_a_policy_that_the_engine_cannot_run_is_refused_at_the_start(
    config: object, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"vllm engine|cannot run"):
        engine = TorchEngine(tmp_path)
        await engine.start()


def test_stop_tokens_come_from_config_generation_settings_and_tokeniser(tmp_path: Path) -> None:
    folder = write_tiny_policy(tmp_path / "policy")
    assert load_architecture(folder).stop_ids == {EOS_ID}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 99_999]}))
    assert load_architecture(folder).stop_ids == {EOS_ID, 7, 9}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert load_architecture(folder).stop_ids == {EOS_ID, 7, 9}, "the tokeniser names it too"


async def test_an_engine_that_was_not_started_says_so(policy: Policy) -> None:
    engine = TorchEngine(policy.folder)
    assert engine.installed is None
    assert engine.stats().num_tokens == 0
    with pytest.raises(EngineFault, match="not started"):
        await complete(engine, request(prompt(3)))
    await engine.stop()
    with pytest.raises(EngineFault, match="make a new one"):
        await engine.start()


async def test_a_step_that_fails_is_told_to_its_readers_and_the_engine_goes_on(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(policy.folder)
    await engine.start()
    await engine.install(policy.stage(FIRST))
    decoder = engine._decoder
    assert decoder is not None
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_decode_logits", lambda num_rows: torch.zeros(1 // (num_rows - num_rows)))
        with pytest.raises(EngineFault, match="while computing this request: integer division"):
            await complete(engine, request(prompt(3), max_tokens=5))
    done = await complete(engine, request(prompt(3), max_tokens=5))
    assert len(done.token_ids) == 5
    assert engine.stats().num_running == 0
    await engine.stop()


async def test_a_thread_that_dies_fails_every_request_and_those_to_come(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(policy.folder, stream_seconds=0.0)
    await engine.start()
    await engine.install(policy.stage(FIRST))
    monkeypatch.setattr(engine._decoder, "flush", lambda: 1 // 0)
    outcomes = await asyncio.gather(
        *(complete(engine, request(prompt(3), max_tokens=500)) for _ in range(3)), return_exceptions=True
    )
    assert all(isinstance(outcome, EngineFault) for outcome in outcomes)
    with pytest.raises(EngineFault, match="crashed"):
        await complete(engine, request(prompt(3)))
    await engine.stop()


async def test_an_install_that_breaks_off_leaves_no_version_to_generate_with(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(policy.folder)
    await engine.start()
    await engine.install(policy.stage(FIRST))
    with monkeypatch.context() as patch:
        patch.setattr("actors.engines.tensors.WeightUpdate.apply", lambda self: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            await engine.install(policy.stage(PolicyVersion(1, 1)))
    assert engine.installed is None
    await engine.install(policy.stage(PolicyVersion(1, 2)))
    done = await complete(engine, request(prompt(3), max_tokens=2))
    assert done.spans == [(PolicyVersion(1, 2), 2)]
    await engine.stop()


async def test_the_first_version_decides_the_dtype(policy: Policy) -> None:
    engine = TorchEngine(policy.folder)
    await engine.start()
    await engine.install(in_bfloat16(policy, FIRST))
    assert engine._model is not None
    assert {parameter.dtype for parameter in engine._model.parameters()} == {torch.bfloat16}
    ids = prompt(5)
    done = await complete(engine, request(ids, max_tokens=10))
    policy.model.bfloat16()
    assert done.logprobs == pytest.approx(policy.logprobs(ids, done.token_ids), abs=0.1)
    policy.model.float()
    with pytest.raises(WeightTransferError, match=r"float32; the policy has it in torch\.bfloat16"):
        await engine.install(policy.stage(PolicyVersion(1, 1)))
    await engine.stop()


async def test_a_dtype_that_is_asked_for_is_kept(policy: Policy) -> None:
    engine = TorchEngine(policy.folder, dtype=torch.float32)
    await engine.start()
    await engine.install(in_bfloat16(policy, FIRST))
    assert engine._model is not None
    assert {parameter.dtype for parameter in engine._model.parameters()} == {torch.float32}
    await engine.stop()


async def test_tokens_are_handed_out_whole_when_streaming_is_slow(policy: Policy) -> None:
    engine = TorchEngine(policy.folder, stream_seconds=3600.0)
    await engine.start()
    await engine.install(policy.stage(FIRST))
    chunks = [chunk async for chunk in engine.generate(request(prompt(3), max_tokens=50))]
    assert [len(chunk.token_ids) for chunk in chunks] == [50]
    await engine.stop()
