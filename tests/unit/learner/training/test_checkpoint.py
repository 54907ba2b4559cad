"""Checkpoints that are written while training goes on."""

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from learner.training import checkpoint
from learner.training.checkpoint import CheckpointDamaged, Checkpoints, newest, verify
from learner.training.config import OptimizerConfig
from learner.training.loop import CheckpointLog, Position
from learner.training.model import load_policy
from learner.training.optimizer import make_optimizer
from learner.training.parallel import Ranks
from learner.training.updater import Updater
from penstock.errors import PenstockError
from tests.tiny_policy import write_tiny_policy
from tests.trainer_fakes import FakeCoordinator

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
PATIENCE_SECONDS = 60.0


@pytest.fixture
def updater(tmp_path: Path) -> Updater:
    policy = load_policy(write_tiny_policy(tmp_path / "policy"))
    optimizer = make_optimizer(policy, OptimizerConfig())
    return Updater(policy, optimizer, ONE_RANK, row_tokens=64, max_grad_norm=1.0)


class SlowDisk:
    """Holds every write back until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self._write = checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", self._save)

    def _save(self, state: dict[str, torch.Tensor], path: Path) -> None:
        assert self.free.wait(PATIENCE_SECONDS)
        self._write(state, path)


def fill(updater: Updater, value: float) -> None:
    with torch.no_grad():
        for parameter in updater.policy.parameters():
            parameter.fill_(value)


def test_what_is_trained_during_the_writing_is_not_in_the_checkpoint(
    tmp_path: Path, updater: Updater, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    checkpoints = Checkpoints(tmp_path / "checkpoints", updater, keep=2)
    fill(updater, 1.0)
    checkpoints.begin(5)
    fill(updater, 2.0)
    assert not checkpoints.is_written()
    assert newest(tmp_path / "checkpoints") is None
    disk.free.set()
    assert checkpoints.finish().step == 5
    assert checkpoints.resume() == 5
    assert all(bool((parameter == 1.0).all()) for parameter in updater.policy.parameters())


def test_the_coordinator_hears_of_a_checkpoint_once_it_is_on_disk_and_the_next_one_waits(
    tmp_path: Path, updater: Updater, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, coordinator = SlowDisk(monkeypatch), FakeCoordinator()
    checkpoints = Checkpoints(tmp_path / "checkpoints", updater, keep=2)
    log = CheckpointLog(checkpoints, coordinator, ONE_RANK, every_steps=2, in_background=True)
    position = Position(epoch=1, step=2)
    log.after_step(position, {})
    position.step = 3
    log.after_step(position, {})
    assert coordinator.calls == []
    disk.free.set()
    position.step = 4
    log.after_step(position, {})
    assert coordinator.calls[0] == "checkpoint 2"
    log.write(position)
    assert coordinator.calls == ["checkpoint 2", "checkpoint 4"]


def test_a_disk_that_fails_ends_the_training_with_its_reason(
    tmp_path: Path, updater: Updater, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: dict[str, torch.Tensor], path: Path) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path / "checkpoints", updater, keep=2)
    checkpoints.write(1)
    monkeypatch.setattr(checkpoint, "save_file", full)
    checkpoints.begin(2)
    with pytest.raises(PenstockError, match=r"checkpoint of step 2 could not be written.*No space left"):
        checkpoints.finish()
    found = newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 1


class TwoRanks(Ranks):
    """The first of two, whose second says each time what it has found."""

    def __init__(self, *found: str) -> None:
        super().__init__(rank=0, world_size=2, device=torch.device("cpu"), mesh=None)
        object.__setattr__(self, "found", list(found))

    def gather_bytes(self, data: bytes) -> list[NDArray[np.uint8]]:
        told = self.found.pop(0).encode()
        return [np.frombuffer(each, dtype=np.uint8) for each in (data, told)]


def test_a_file_that_another_rank_finds_damaged_has_all_of_them_take_the_checkpoint_before(
    tmp_path: Path, updater: Updater, caplog: pytest.LogCaptureFixture
) -> None:
    """Each hashes its share, so that none waits for one that hashes all."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", updater, keep=2)
    for step in (1, 2):
        fill(updater, float(step))
        checkpoints.write(step)
    updater.ranks = TwoRanks("", "its file is rotten", "", "")
    with caplog.at_level(logging.ERROR):
        assert checkpoints.resume() == 1
    assert "step-00000002 is damaged and is not used: its file is rotten" in caplog.text
    assert all(bool((parameter == 1.0).all()) for parameter in updater.policy.parameters())
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged", "step"]


def test_a_rank_s_share_of_the_files_is_all_that_it_checks(tmp_path: Path, updater: Updater) -> None:
    path = Checkpoints(tmp_path / "checkpoints", updater).write(1).path
    (path / "rank-0-of-1.safetensors").write_bytes(b"rotten")
    assert verify(path, rank=1, world_size=2).step == 1
    for share in ({}, {"rank": 0, "world_size": 2}):
        with pytest.raises(CheckpointDamaged, match="rank-0-of-1"):
            verify(path, **share)
