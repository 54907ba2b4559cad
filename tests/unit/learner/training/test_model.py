import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig

from learner.training.model import load_policy
from learner.training.packing import TokenSequence, pack
from learner.training.policy import RowForm
from penstock.errors import ConfigError
from tests.tiny_policy import SIZES, write_family, write_tiny_policy


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_policy_is_loaded_in_float32_and_evaluated_packed(tmp_path: Path) -> None:
    policy = load_policy(write_tiny_policy(tmp_path))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert policy.evaluation.form is RowForm.PACKED
    assert policy.evaluation.split_head


def test_weights_in_half_precision_become_float32_masters(tmp_path: Path) -> None:
    folder = write_tiny_policy(tmp_path)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, dtype="bfloat16")
    assert next(load_policy(folder).parameters()).dtype == torch.float32


def rotating(policy_type: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    return policy_type(**SIZES, bos_token_id=1, eos_token_id=1, pad_token_id=0, **settings)


def longrope(max_position_embeddings: int) -> PreTrainedConfig:
    rotation = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    }
    return rotating(
        Phi3Config,
        max_position_embeddings=max_position_embeddings,
        original_max_position_embeddings=16,
        rope_parameters=rotation,
    )


def test_frequencies_that_depend_on_other_sequences_are_refused(tmp_path: Path) -> None:
    write_family(tmp_path, longrope(64))
    for deferred in (False, True):
        with pytest.raises(ConfigError, match=r"type longrope.*longer than 16 tokens.*context is 64"):
            load_policy(tmp_path, deferred=deferred)


@pytest.mark.parametrize(
    "config",
    [
        longrope(16),
        rotating(
            LlamaConfig,
            max_position_embeddings=16,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        ),
    ],
    ids=["longrope", "dynamic"],
)
def test_frequencies_that_change_beyond_the_context_only_are_those_of_a_sequence_alone(
    tmp_path: Path, config: PreTrainedConfig
) -> None:
    write_family(tmp_path, config)
    policy = load_policy(tmp_path)
    draw = np.random.default_rng(0)
    sequences = [
        TokenSequence(
            token_ids=draw.integers(3, 51, length).astype(np.int32), loss_mask=np.ones(length, np.uint8)
        )
        for length in (16, 6)
    ]
    together = policy(pack(sequences, [0, 1], torch.device("cpu")), temperature=1.0).logprobs_S
    alone = policy(pack(sequences, [1], torch.device("cpu")), temperature=1.0).logprobs_S
    torch.testing.assert_close(together[-5:], alone, rtol=1e-4, atol=1e-4)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: no such folder; expected a Hugging Face policy"):
        load_policy(tmp_path / "none")


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_model_type(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def unknown_architecture(folder: Path) -> None:
    edit_config(folder, model_type="qwen3000", architectures=["Qwen3000ForCausalLM"])


def not_causal(folder: Path) -> None:
    edit_config(folder, model_type="vit")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)


def another_depth(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, "has no config.json"),
        (break_config, "is not JSON"),
        (remove_model_type, "names no model_type"),
        (unknown_architecture, "transformers cannot use it"),
        (not_causal, "the weights cannot be loaded"),
        (remove_weights, "has no weights; expected model.safetensors"),
        (only_pickles, "is a pickle and is not read"),
        (truncate_weights, "the weights cannot be loaded"),
        (another_shape, "have another shape than config.json says"),
        (another_depth, "are missing from the weights"),
        (not_finite, "logits are not finite"),
    ],
)
def test_a_malformed_folder_is_refused_with_the_reason(tmp_path: Path, damage, message: str) -> None:
    folder = write_tiny_policy(tmp_path)
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load_policy(folder)
