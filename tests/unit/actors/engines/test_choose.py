"""Which engine is chosen, and what is said when it cannot be had."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from actors.engines.choose import choose_device, choose_engine, make_engine
from actors.engines.torch import TorchEngine
from actors.engines.vllm import VllmEngine
from penstock.errors import ConfigError
from tests.conformance.policies import configs, write_policy


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_auto_takes_vllm_on_a_gpu_where_it_is_installed(installed: None) -> None:
    assert choose_engine("auto", "cuda:1") == "vllm"
    assert choose_engine("auto", "cpu") == "torch"
    assert choose_engine("vllm", "cpu") == "vllm"


def test_auto_takes_torch_where_vllm_is_missing(missing: None) -> None:
    assert choose_engine("auto", "cuda") == "torch"


def test_vllm_that_is_missing_is_told_with_what_installs_it(missing: None) -> None:
    with pytest.raises(ConfigError, match="make setup-vllm"):
        choose_engine("vllm", "cpu")


def test_a_device_must_be_one() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="expected cpu, cuda"):
        choose_device("abacus")


def test_engines_are_made_by_name(tmp_path: Path) -> None:
    policy = write_policy(tmp_path / "policy", configs()["qwen3-tied"])
    torch = make_engine("torch", policy.folder, device="cpu", num_slots=3, max_context=64)
    vllm = make_engine("vllm", policy.folder, device="cpu", num_slots=3, max_context=64)
    assert isinstance(torch, TorchEngine)
    assert isinstance(vllm, VllmEngine)
    assert (torch.num_slots, torch.max_context) == (vllm.num_slots, vllm.max_context) == (3, 64)
    with pytest.raises(ConfigError, match="one device"):
        make_engine("torch", policy.folder, device="cpu", num_slots=3, tensor_parallel_size=2)
