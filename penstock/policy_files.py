"""What a policy folder holds besides weights: architecture and tokeniser.

Actors need these to start; weights reach them as versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from penstock.errors import ConfigError, ProtocolError
from penstock.v1 import weights_pb2

_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5"})
_MAX_FILE_BYTES = 256 * 1024 * 1024
PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFolder:
    """A checked Hugging Face folder."""

    path: Path
    vocab_size: int
    max_context: int
    files: Mapping[str, bytes]
    """Name and content of all but the weights."""

    def listing(self) -> weights_pb2.PolicyFiles:
        return weights_pb2.PolicyFiles(
            files=[
                weights_pb2.PolicyFile(name=name, num_bytes=len(data), digest=_digest(data))
                for name, data in self.files.items()
            ]
        )

    def pieces(self) -> Iterator[tuple[str, bytes]]:
        """(name, data) of at most 1 MiB; the name only with a file's first piece."""
        for name, data in self.files.items():
            for start in range(0, max(len(data), 1), PIECE_BYTES):
                yield ("" if start else name), data[start : start + PIECE_BYTES]


def read_policy_folder(path: Path) -> PolicyFolder:
    """Checks a policy folder without loading it. Raises ConfigError."""
    if not path.is_dir():
        raise ConfigError(
            f"policy {path}: no such folder; expected a Hugging Face model folder, such as "
            "`hf download NAME --local-dir FOLDER` makes"
        )
    config = _read_config(path / "config.json")
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"policy {path}: holds no *.safetensors file; expected the model's weights")
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"policy {path}: holds no tokenizer.json, tokenizer.model or vocab.json")
    text = config.get("text_config", config)
    return PolicyFolder(
        path=path,
        vocab_size=_positive(text, "vocab_size", path),
        max_context=_positive(text, "max_position_embeddings", path),
        files={
            file.name: file.read_bytes()
            for file in sorted(path.iterdir())
            if file.is_file() and _is_wanted(file)
        },
    )


def write_policy_files(folder: Path, listing: weights_pb2.PolicyFiles, pieces: Mapping[str, bytes]) -> None:
    """Writes what was fetched, if names, sizes and digests are right. Raises ProtocolError."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in listing.files:
        if Path(file.name).name != file.name or file.name in ("", ".", ".."):
            raise ProtocolError(f"policy file {file.name!r} is not a plain file name")
        data = pieces.get(file.name)
        if data is None or len(data) != file.num_bytes or _digest(data) != file.digest:
            got = "nothing" if data is None else f"{len(data)} bytes"
            raise ProtocolError(
                f"policy file {file.name}: got {got}; expected {file.num_bytes} bytes with digest {file.digest}"
            )
        (folder / file.name).write_bytes(data)


def _is_wanted(file: Path) -> bool:
    is_weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
    return not is_weights and not file.name.startswith(".") and file.stat().st_size <= _MAX_FILE_BYTES


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds {type(config).__name__}; expected an object")
    return config


def _positive(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path}/config.json: {key} is {value!r}; expected a positive integer")
    return value


def _digest(data: bytes) -> str:
    return blake3.blake3(data).hexdigest()
