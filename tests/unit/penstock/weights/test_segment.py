"""The ring of shared segments."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import ConfigError, WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights import segment as segment_module
from penstock.weights.manifest import HostTensor, Manifest, SharedMemoryMedium, check_manifest, pack
from penstock.weights.segment import SegmentRing, create_segment, open_segment, run_prefix, segment_path
from penstock.weights.staged import stage
from tests.weight_fixtures import CHUNK, tensor, tensors

PREFIX = "penstock-test-segment"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /dev/shm."""
    monkeypatch.setattr(segment_module, "_directories", lambda: (tmp_path,))
    return tmp_path


@pytest.fixture
def ring(folder: Path) -> Iterator[SegmentRing]:
    ring = SegmentRing(name_prefix=PREFIX, num_segments=3, chunk_bytes=CHUNK)
    yield ring
    ring.close()


def medium_of(manifest: Manifest) -> SharedMemoryMedium:
    (medium,) = manifest.media
    assert isinstance(medium, SharedMemoryMedium)
    return medium


def test_a_version_is_written_and_read(ring: SegmentRing) -> None:
    manifest = ring.write(PolicyVersion(1, 4), tensors())
    medium = medium_of(manifest)
    segment = open_segment(medium, manifest.num_bytes)
    assert segment.nonce == medium.nonce != "00" * 16
    assert np.array_equal(segment.payload, stage(PolicyVersion(1, 4), tensors()).buffer)
    check_manifest(manifest)
    assert manifest.version == PolicyVersion(1, 4)


def test_segments_are_allocated_once_and_reused_in_turn(ring: SegmentRing, folder: Path) -> None:
    names = [medium_of(ring.write(PolicyVersion(1, step), tensors(seed=step))).name for step in range(9)]
    assert names == [*names[:3]] * 3
    assert sorted(path.name for path in folder.iterdir()) == sorted(names[:3])


def test_each_version_has_a_nonce_of_its_own(ring: SegmentRing) -> None:
    nonces = {medium_of(ring.write(PolicyVersion(1, step), tensors())).nonce for step in range(9)}
    assert len(nonces) == 9


def test_the_nonce_is_zero_while_a_segment_is_written(
    ring: SegmentRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ring.write(PolicyVersion(1, 0), tensors())
    reader = open_segment(medium_of(first), first.num_bytes)
    seen = []

    def watched_pack(*args: object) -> None:
        seen.append(reader.nonce)
        pack(*args)  # type: ignore[arg-type]
        seen.append(reader.nonce)

    for step in range(1, 3):
        ring.write(PolicyVersion(1, step), tensors())
    monkeypatch.setattr(segment_module, "pack", watched_pack)
    overwriting = ring.write(PolicyVersion(1, 3), tensors(seed=1))
    assert seen == ["00" * 16] * 2
    assert reader.nonce == medium_of(overwriting).nonce


def test_only_chunks_that_changed_are_hashed_again(
    ring: SegmentRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    digest = segment_module.chunk_digest

    def counting(data: np.ndarray) -> bytes:
        hashed.append(data.size)
        return digest(data)

    monkeypatch.setattr(segment_module, "chunk_digest", counting)
    first = ring.write(PolicyVersion(1, 0), tensors())
    assert len(hashed) == len(first.chunk_digests)
    hashed.clear()

    again = ring.write(PolicyVersion(1, 1), tensors())
    assert not hashed
    assert again.digest == first.digest

    late = tensors()
    late[2].data[2 * CHUNK - 1] ^= 1
    changed = ring.write(PolicyVersion(1, 2), late)
    assert len(hashed) == 1
    assert changed.digest == stage_digest(late)


def stage_digest(content: list[HostTensor]) -> str:
    other = SegmentRing(name_prefix=f"{PREFIX}-other", chunk_bytes=CHUNK)
    digest = other.write(PolicyVersion(1, 0), content).digest
    other.close()
    return digest


def test_gaps_are_zero_whatever_the_segment_held_before(ring: SegmentRing) -> None:
    full = [tensor("full", (64,))]
    sparse = [tensor("a", (1,)), tensor("b", (1,)), tensor("c", (2,))]
    for step in range(3):
        ring.write(PolicyVersion(1, step), full)
    manifest = ring.write(PolicyVersion(1, 3), sparse)
    payload = open_segment(medium_of(manifest), manifest.num_bytes).payload
    assert not payload[4:64].any()
    assert manifest.digest == stage_digest(sparse)


def test_a_larger_version_gets_a_larger_segment(ring: SegmentRing) -> None:
    for step in range(4):
        small = ring.write(PolicyVersion(1, step), [tensor("x", (10,))])
    large = ring.write(PolicyVersion(1, 4), [tensor("x", (10_000,))])
    assert medium_of(large).name != medium_of(small).name
    assert open_segment(medium_of(large), large.num_bytes).capacity >= 40_000


def test_files_are_private_and_gone_after_close(ring: SegmentRing, folder: Path) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    path = segment_path(medium_of(manifest).name)
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    reader = open_segment(medium_of(manifest), manifest.num_bytes)
    ring.close()
    ring.close()
    assert list(folder.iterdir()) == []
    assert reader.nonce == medium_of(manifest).nonce, "who has it mapped keeps it"
    with pytest.raises(WeightTransferError, match="not on this host"):
        open_segment(medium_of(manifest), manifest.num_bytes)


def test_what_a_dead_process_left_is_removed_and_what_lives_is_not(ring: SegmentRing, folder: Path) -> None:
    living = segment_path(medium_of(ring.write(PolicyVersion(1, 0), tensors())).name)
    abandoned = folder / f"{PREFIX}.00112233445566ff"
    foreign = [folder / f"{PREFIX}-2.00112233445566ff", folder / f"{PREFIX}.txt", folder / "other"]
    for path in (abandoned, *foreign):
        path.write_bytes(bytes(200))
    second = SegmentRing(name_prefix=PREFIX)
    assert not abandoned.exists()
    assert living is not None
    assert living.exists()
    assert all(path.exists() for path in foreign)
    second.close()


def test_without_room_in_shared_memory_another_folder_is_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = tmp_path / "missing"
    monkeypatch.setattr(segment_module, "_directories", lambda: (full, tmp_path))
    ring = SegmentRing(name_prefix=PREFIX)
    with caplog.at_level(logging.WARNING):
        manifest = ring.write(PolicyVersion(1, 0), tensors())
    assert str(full) in caplog.text
    assert segment_path(medium_of(manifest).name) == tmp_path / medium_of(manifest).name
    assert open_segment(medium_of(manifest), manifest.num_bytes).nonce == medium_of(manifest).nonce
    ring.close()


def test_without_room_anywhere_publishing_fails_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(file: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    ring = SegmentRing(name_prefix=PREFIX)
    with pytest.raises(WeightTransferError, match="No space left"):
        ring.write(PolicyVersion(1, 0), tensors())
    assert list(folder.iterdir()) == []


def test_only_segments_can_be_opened(folder: Path) -> None:
    name = f"{PREFIX}.0123456789abcdef"
    (folder / "elsewhere").write_bytes(bytes(1000))
    for bad in ("../elsewhere", "/etc/passwd", "elsewhere", f"{name}/x", ""):
        with pytest.raises(WeightTransferError, match="not a segment's name"):
            open_segment(SharedMemoryMedium(name=bad, nonce=""), 1)
    (folder / name).symlink_to(folder / "elsewhere")
    with pytest.raises(WeightTransferError, match="cannot be opened"):
        open_segment(SharedMemoryMedium(name=name, nonce=""), 1)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(WeightTransferError, match="expected a file"):
        open_segment(SharedMemoryMedium(name=name, nonce=""), 1)
    (folder / name).unlink()
    (folder / name).write_bytes(bytes(100))
    with pytest.raises(WeightTransferError, match="at least 101"):
        open_segment(SharedMemoryMedium(name=name, nonce=""), 37)


def test_a_prefix_that_is_no_file_name_is_refused() -> None:
    for bad in ("", "a/b", "a.b", "x" * 65):
        with pytest.raises(ConfigError, match="cannot begin a file's name"):
            SegmentRing(name_prefix=bad)
    with pytest.raises(ConfigError, match="at least 2"):
        SegmentRing(name_prefix="x", num_segments=1)


def segment_of(run_id: str, folder: Path, *, hours_old: int, alive: bool) -> Path:
    owned = create_segment(run_prefix(run_id), 64)
    path = folder / owned.segment.name
    made = path.stat().st_mtime - 3600 * hours_old
    os.utime(path, (made, made))
    if not alive:
        owned.close()
    return path


def test_a_start_removes_what_dead_trainers_of_any_run_left_long_ago(folder: Path) -> None:
    long_dead = segment_of("a", folder, hours_old=1, alive=False)
    alive = segment_of("b", folder, hours_old=1, alive=True)
    just_died = segment_of("c", folder, hours_old=0, alive=False)
    of_this_run = segment_of("d", folder, hours_old=0, alive=False)
    engines = folder / f"penstock-engine-0-layout.{'0' * 16}"
    engines.touch()
    os.utime(engines, (0, 0))
    SegmentRing(name_prefix=run_prefix("d")).close()
    assert not long_dead.exists()
    assert not of_this_run.exists()
    assert alive.exists()
    assert just_died.exists(), "its actors may still fetch from it"
    assert engines.exists(), "they have their own way of telling"
