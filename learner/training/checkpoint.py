"""Checkpoints: everything that training needs to go on as if it had never stopped.

    step-00000050/
        rank-0-of-2.safetensors    that rank's part of every parameter and optimiser state, and its RNG
        rank-1-of-2.safetensors
        manifest.json              step, shapes, which rows (and columns) each file holds, BLAKE3 digest of each
                                   file and of the weights as published
        manifest.blake3            digest of manifest.json

Tensors are cut as they are shared, each part one block of rows and columns, so any number of
ranks in any layout can read what any other wrote. A checkpoint is written aside, synced,
hashed, and then renamed: a folder of the final name is complete, or it was damaged
later, which its digests tell.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import save_file

from learner.training.adapters import Adapters
from learner.training.blocks import block_of, is_copy
from learner.training.checkpoint_reader import FORMATS, CheckpointReader
from learner.training.parallel import Ranks, local
from learner.training.publish import trained_tensors
from learner.training.retention import MANIFEST, PREFIX, Retention
from learner.training.updater import Updater
from penstock.errors import ConfigError, PenstockError

_log = logging.getLogger(__name__)

WRITE_SECONDS = 1800.0
"""A shard that takes longer to write has a dead disk under it."""
POLICY = "policy/"
_OPTIMIZER = "optimizer/"
_RNG = "rng/"
_DIGEST = "manifest.blake3"


class CheckpointDamaged(Exception):
    """A checkpoint is not what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    digest: str
    """BLAKE3-256 of its manifest, in hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """A checkpoint whose shard a thread writes."""

    step: int
    digest: Future[bytes]
    metrics: dict[str, float]
    epoch: int
    weights: str
    """Their digest; empty where rank 0 knows none."""

    def result(self) -> bytes:
        """The shard's digest, once it is on disk. Raises PenstockError."""
        try:
            return self.digest.result(timeout=WRITE_SECONDS)
        except (OSError, SafetensorError, TimeoutError) as error:
            reason = f"not within {WRITE_SECONDS:.0f} s" if isinstance(error, TimeoutError) else str(error)
            raise PenstockError(
                f"the checkpoint of step {self.step} could not be written: {reason}; the ones before it are "
                "whole: free some disk, or mend it, and start again"
            ) from error


class Checkpoints:
    """The checkpoints of one run. Every rank calls the same methods in the same order."""

    def __init__(
        self, folder: Path, updater: Updater, *, keep: int = 1, retention: Retention | None = None
    ) -> None:
        """retention: which stay, if it is not the newest `keep`."""
        self._folder = folder
        self._updater = updater
        self._retention = retention or Retention(keep=keep)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    def write(self, step: int, metrics: Mapping[str, float] | None = None) -> Checkpoint:
        """Writes the state after `step` steps; deletes what need not stay. Raises PenstockError."""
        self.begin(step, metrics)
        return self.finish()

    def begin(
        self, step: int, metrics: Mapping[str, float] | None = None, *, epoch: int = 0, weights: str = ""
    ) -> None:
        """Copies the state into host memory, and has a thread write it. Training may go on; `finish` is due.

        metrics, the version (epoch, step) and, on rank 0, the digest of its weights as published: what to tell
        checkpoints apart by.
        """
        assert self._pending is None, "the checkpoint before this one is not finished"
        ranks, aside = self._updater.ranks, self._aside(step)
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        ranks.barrier()
        shard = aside / _shard_name(ranks.rank, ranks.world_size)
        self._pending = _Pending(
            step=step,
            digest=self._writer.submit(_write_shard, _state_of(self._updater), shard),
            metrics=dict(metrics or {}),
            epoch=epoch,
            weights=weights,
        )

    def is_written(self) -> bool:
        """Whether every rank's thread is done, so that `finish` need not wait."""
        assert self._pending is not None
        unfinished = torch.tensor([int(not self._pending.digest.done())])
        return not int(self._updater.ranks.maximum(unfinished))

    def finish(self) -> Checkpoint:
        """Waits for the thread and names the checkpoint: only now it exists. Raises PenstockError."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        ranks, step = self._updater.ranks, pending.step
        final, aside = self._folder / f"{PREFIX}{step:08d}", self._aside(step)
        try:
            written = pending.result()
        except PenstockError:
            # A full disk needs the room.
            shutil.rmtree(aside, ignore_errors=True)
            raise
        digests = ranks.gather(torch.frombuffer(bytearray(written), dtype=torch.uint8))
        named = [bytes(digest.tolist()).hex() for digest in digests]
        manifest = _manifest_bytes(self._updater, pending, named)
        digest = blake3(manifest).hexdigest()
        if ranks.is_first:
            _write_synced(aside / MANIFEST, manifest)
            _write_synced(aside / _DIGEST, digest.encode())
            _replace(aside, final)
            self._delete_old()
        ranks.barrier()
        return Checkpoint(path=final, step=step, digest=digest)

    def resume(self) -> int:
        """Loads the newest sound checkpoint; returns its step, or 0 if there is none at all.

        A damaged one is set aside under another name, loudly, and the one before is taken. What a
        trainer that died had written of another is deleted.
        """
        found = self._newest()
        if self._updater.ranks.is_first:
            self.delete_unfinished()
        if found is None:
            return 0
        _load(found.path, self._updater)
        return found.step

    def _newest(self) -> Checkpoint | None:
        """The newest sound one. Damaged ones are logged and renamed."""
        ranks = self._updater.ranks
        while True:
            newest_first = checkpoint_folders(self._folder) if ranks.is_first else []
            name = ranks.gather_bytes(newest_first[0].name.encode() if newest_first else b"")[0]
            if not name.size:
                return None
            path = self._folder / name.tobytes().decode()
            try:
                return self._verify(path)
            except CheckpointDamaged as damage:
                if ranks.is_first:
                    _log.error("checkpoint %s is damaged and is not used: %s", path, damage)
                    path.rename(path.with_name(f"damaged-{path.name}-{os.getpid()}"))

    def _verify(self, path: Path) -> Checkpoint:
        """Each rank checks its share of the files. Raises CheckpointDamaged on all of them if one finds damage."""
        ranks = self._updater.ranks
        found, damage = None, ""
        try:
            found = verify(path, rank=ranks.rank, world_size=ranks.world_size)
        except CheckpointDamaged as error:
            damage = str(error) or repr(error)
        told = [part.tobytes().decode() for part in ranks.gather_bytes(damage.encode())]
        if found is None or any(told):
            raise CheckpointDamaged(next(filter(None, told)))
        return found

    def delete_unfinished(self) -> None:
        """Deletes what a trainer that died had written of another checkpoint."""
        for half in self._folder.glob(f".{PREFIX}*.writing"):
            shutil.rmtree(half, ignore_errors=True)

    def load(self, step: int) -> None:
        """Loads the checkpoint of a step. Raises ConfigError if there is no sound one."""
        path = self._folder / f"{PREFIX}{step:08d}"
        try:
            self._verify(path)
        except CheckpointDamaged as damage:
            raise ConfigError(f"{path}: cannot be resumed from: {damage}") from damage
        _load(path, self._updater)

    def _aside(self, step: int) -> Path:
        return self._folder / f".{PREFIX}{step:08d}.writing"

    def _delete_old(self) -> None:
        for path in self._retention.stale(checkpoint_folders(self._folder)):
            shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose digests hold. Damaged ones are logged."""
    for path in checkpoint_folders(folder):
        try:
            return verify(path)
        except CheckpointDamaged as damage:
            _log.error("checkpoint %s is damaged and is not used: %s", path, damage)
    return None


def verify(path: Path, *, rank: int = 0, world_size: int = 1) -> Checkpoint:
    """Checks every byte against the manifest, or those of a rank's share of the files. Raises CheckpointDamaged."""
    try:
        manifest, stated = (path / MANIFEST).read_bytes(), (path / _DIGEST).read_text("ascii")
        if blake3(manifest).hexdigest() != stated:
            raise CheckpointDamaged(f"{MANIFEST} does not have the digest that {_DIGEST} states")
        fields = json.loads(manifest)
        for name, digest in list(fields["files"].items())[rank::world_size]:
            if _hash(path / name).hex() != digest:
                raise CheckpointDamaged(f"{name} does not have the digest that {MANIFEST} states")
        return Checkpoint(path=path, step=fields["step"], digest=stated)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointDamaged(str(error)) from error


def checkpoint_folders(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((path for path in folder.glob(f"{PREFIX}*") if path.is_dir()), reverse=True)


def _shard_name(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}.safetensors"


def _write_shard(state: dict[str, torch.Tensor], shard: Path) -> bytes:
    """Returns the file's digest, once it is synced."""
    save_file(state, shard)
    _sync(shard)
    return _hash(shard)


def _state_of(updater: Updater) -> dict[str, torch.Tensor]:
    """A copy of this rank's part of everything, on the CPU, and its RNG."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _own_tensors(updater):
        if _is_written(tensor, updater.ranks.rank):
            state[name] = local(tensor).to("cpu", copy=True).contiguous()
    state[f"{_RNG}cpu"] = torch.get_rng_state()
    if updater.ranks.device.type == "cuda":
        state[f"{_RNG}cuda"] = torch.cuda.get_rng_state(updater.ranks.device)
    return state


def _own_tensors(updater: Updater) -> Iterator[tuple[str, torch.Tensor]]:
    """Of this rank's stage: all that no other stage writes."""
    stage = updater.policy.stage
    for name, tensor in trained_tensors(updater.policy):
        if stage is None or stage.owns(name):
            yield f"{POLICY}{name}", tensor
    for name, parameter in updater.policy.causal_lm.named_parameters():
        for kind, value in updater.optimizer.state.get(parameter, {}).items():
            if stage is None or stage.owns(name):
                yield f"{_OPTIMIZER}{kind}/{name}", value


def _is_written(tensor: torch.Tensor, rank: int) -> bool:
    """Whether a rank's file has its part: scalars stand in each, of copies the first does."""
    return tensor.ndim == 0 or not is_copy(tensor, rank)


def _manifest_bytes(updater: Updater, pending: _Pending, digests: list[str]) -> bytes:
    world_size = updater.ranks.world_size
    tensors = _placements(updater)
    files = {_shard_name(rank, world_size): digest for rank, digest in enumerate(digests)}
    has_columns = any("columns" in entry for entry in tensors.values())
    fields = {"format": FORMATS[int(has_columns)], "step": pending.step, "files": files, "tensors": tensors}
    if pending.epoch:
        fields["epoch"] = pending.epoch
    if pending.metrics:
        fields["metrics"] = pending.metrics
    published = updater.ranks.gather_bytes(pending.weights.encode())[0]
    if published.size:
        fields["weights"] = published.tobytes().decode()
    if updater.policy.adapters is not None:
        fields["adapters"] = dataclasses.asdict(updater.policy.adapters)
    return json.dumps(fields, indent=1).encode()


def _placements(updater: Updater) -> dict[str, Any]:
    """_placement of every tensor; where stages have different ones, of those of all stages."""
    ranks = updater.ranks
    own = {name: _placement(tensor, ranks) for name, tensor in _own_tensors(updater)}
    if updater.policy.stage is None:
        return own
    told = json.dumps(own).encode() if ranks.rank == ranks.of_stage.start else b""
    return {
        name: placement
        for part in ranks.gather_bytes(told)
        if part.size
        for name, placement in json.loads(part.tobytes()).items()
    }


def _placement(tensor: torch.Tensor, ranks: Ranks) -> dict[str, Any]:
    """Which part stands in the file of each rank, as a manifest says it."""
    rows: list[tuple[int, int]] = []
    columns: list[tuple[int, int]] = []
    for rank in range(ranks.world_size):
        is_here = rank in ranks.of_stage
        block = block_of(tensor, rank) if is_here else tuple(slice(0, size) for size in tensor.shape)
        is_written = is_here and _is_written(tensor, rank)
        first = (block[0].start, block[0].stop) if block else (0, 1)
        rows.append(first if is_written else (0, 0))
        columns += [(each.start, each.stop) for each in block[1:2]]
    entry: dict[str, Any] = {"shape": list(tensor.shape), "rows": rows}
    if any(each != (0, tensor.shape[1]) for each in columns):
        entry["columns"] = columns
    return entry


def _load(path: Path, updater: Updater) -> None:
    try:
        with CheckpointReader(path) as reader, torch.no_grad():
            _check_adapters(path, reader.adapters, updater.policy.adapters)
            _load_policy(reader, updater)
            _load_optimizer(reader, updater)
            _load_rng(reader, updater.ranks)
    except (KeyError, SafetensorError, RuntimeError) as error:
        raise ConfigError(
            f"checkpoint {path} does not fit the run's policy: {error}; was `policy` changed since it was written?"
        ) from error


def _check_adapters(path: Path, written: Adapters | None, wanted: Adapters | None) -> None:
    if written == wanted:
        return
    if written is not None and wanted is not None and written.base_digest != wanted.base_digest:
        raise ConfigError(
            f"checkpoint {path} holds adapters of other weights than those of the run's policy folder, which has "
            "changed since: adapters alone are kept in checkpoints; put the folder back as it was"
        )
    raise ConfigError(
        f"checkpoint {path} holds {_described(written)}, but the run trains {_described(wanted)}; set "
        "training.lora back, or take another run_dir"
    )


def _described(adapters: Adapters | None) -> str:
    return (
        "all weights" if adapters is None else f"adapters of rank {adapters.rank}, scale {adapters.scale:g}"
    )


def _load_policy(reader: CheckpointReader, updater: Updater) -> None:
    for name, tensor in trained_tensors(updater.policy):
        _fill(reader, f"{POLICY}{name}", tensor, updater.ranks)


def _load_optimizer(reader: CheckpointReader, updater: Updater) -> None:
    kinds = sorted({name.split("/")[1] for name in reader.tensors if name.startswith(_OPTIMIZER)})
    for name, parameter in updater.policy.causal_lm.named_parameters():
        for kind in kinds if parameter.requires_grad else ():
            key = f"{_OPTIMIZER}{kind}/{name}"
            is_scalar = not reader.tensors[key]["shape"]
            value = (
                torch.zeros((), device=parameter.device)
                if is_scalar
                else torch.zeros_like(parameter.detach())
            )
            _fill(reader, key, value, updater.ranks)
            updater.optimizer.state[parameter][kind] = value


def _fill(reader: CheckpointReader, name: str, tensor: torch.Tensor, ranks: Ranks) -> None:
    if reader.tensors[name]["shape"] != list(tensor.shape):
        raise KeyError(f"{name} has shape {reader.tensors[name]['shape']}, expected {list(tensor.shape)}")
    local(tensor).copy_(reader.block(name, block_of(tensor, ranks.rank)))


def _load_rng(reader: CheckpointReader, ranks: Ranks) -> None:
    """A rank that did not exist when the checkpoint was written keeps its fresh seed."""
    state = reader.of_rank(ranks.rank, f"{_RNG}cpu")
    if state is not None:
        torch.set_rng_state(state)
    state = reader.of_rank(ranks.rank, f"{_RNG}cuda")
    if state is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state, ranks.device)


def _hash(path: Path) -> bytes:
    return blake3().update_mmap(path).digest()


def _write_synced(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(aside: Path, final: Path) -> None:
    """Gives a complete checkpoint its name. One of the same step is replaced."""
    _sync(aside)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _sync(final.parent)
