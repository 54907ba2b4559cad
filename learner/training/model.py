"""Loads a policy from a Hugging Face folder, and says clearly what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner.training.adapters import add_adapters
from learner.training.config import LoraConfig
from learner.training.deferred import build_empty
from learner.training.policy import Policy, Source, choose_evaluation, packed_evaluation
from penstock.errors import ConfigError

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def load_policy(
    folder: Path,
    *,
    activation_checkpointing: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
    deferred: bool = False,
) -> Policy:
    """Loads config and safetensors into float32 masters on the CPU. Raises ConfigError.

    lora: with a rank, adapters are added, and only they will be trained. seed: of their first values.
    deferred: where that can be, weights are read by `place` only, by each rank its own part.
    Dropout is off: it would make the trainer's log-probabilities differ from the engine's.
    """
    _check_rotation(folder, load_policy_config(folder).get_text_config())
    empty = _build_empty(folder) if deferred else None
    causal_lm = load_causal_lm(folder) if empty is None else empty
    if activation_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    causal_lm.eval()
    evaluation = choose_evaluation(causal_lm) if empty is None else packed_evaluation(causal_lm)
    policy = Policy(causal_lm, evaluation)
    policy.source = None if empty is None else Source(folder=folder, seed=seed)
    if lora is not None and lora.rank:
        policy.adapters = add_adapters(causal_lm, lora, base_digest=weights_digest(folder), seed=seed)
    causal_lm.train()
    return policy


def _build_empty(folder: Path) -> Any | None:
    config = load_policy_config(folder)
    _check_weight_files(folder)
    with quiet_transformers():
        return build_empty(folder, config)


def load_causal_lm(folder: Path) -> Any:
    """The weights in float32, with no dropout. Raises ConfigError."""
    config = load_policy_config(folder)
    _check_weight_files(folder)
    with quiet_transformers():
        return _load_weights(folder, config)


def weights_digest(folder: Path) -> str:
    """BLAKE3 of a policy folder's weights, in hexadecimal."""
    digest = blake3()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(blake3().update_mmap(path).digest())
    return digest.hexdigest()


def load_policy_config(folder: Path) -> Any:
    """Reads config.json, with every dropout set to 0. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; expected a Hugging Face policy (config.json, safetensors)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: has no config.json; expected a Hugging Face policy folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ConfigError(
            f"{path}: names no model_type; expected the configuration of a causal language model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: transformers cannot use it: {_first_line(error)}") from error
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _check_rotation(folder: Path, config: Any) -> None:
    """Refuses frequencies that depend on the longest sequence of a pass: the others would get them too."""
    rope = getattr(config, "rope_parameters", None) or {}
    of_each_layer_type = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for rotation in of_each_layer_type:
        if rotation.get("rope_type") != "longrope":
            continue
        original = rotation.get("original_max_position_embeddings", config.max_position_embeddings)
        if config.max_position_embeddings > original:
            raise ConfigError(
                f"{folder}: its rotary embeddings are of type longrope, whose frequencies change for all sequences of "
                f"a pass once one is longer than {original} tokens, and its context is "
                f"{config.max_position_embeddings}: log-probabilities would depend on what else is in a row; take a "
                "policy whose rope_parameters have a fixed type, such as yarn, llama3 or linear"
            )


def _check_weight_files(folder: Path) -> None:
    if any((folder / name).is_file() for name in _WEIGHT_FILES):
        return
    unsafe = [path.name for path in folder.glob("*.bin")]
    hint = f"; {unsafe[0]} is a pickle and is not read: convert it to safetensors" if unsafe else ""
    raise ConfigError(f"{folder}: has no weights; expected {' or '.join(_WEIGHT_FILES)}{hint}")


def _load_weights(folder: Path, config: Any) -> Any:
    try:
        causal_lm, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder}: the weights cannot be loaded: {_first_line(error)}") from error
    _check_report(folder, report)
    return causal_lm


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    for kind, meaning in (
        ("mismatched_keys", "have another shape than config.json says"),
        ("missing_keys", "are missing from the weights"),
        ("error_msgs", "could not be read"),
    ):
        names = sorted(name if isinstance(name, str) else str(name[0]) for name in report.get(kind) or ())
        if names:
            raise ConfigError(f"{folder}: {len(names)} tensors {meaning}, such as {names[0]}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports for folders that are read or written: what matters is raised."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
