"""Disks that are full, fail, or lie: no acknowledgement after an error, and nothing that was acknowledged is lost."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from learner.config import DiskConfig
from learner.coordinator.core import NO_LIMITS
from penstock.errors import LedgerError

from .bench import RESTART_FLEET, Bench, until
from .scripted_actor import Script

MEBIBYTE = 1024 * 1024
HEAVY = Script(token_bytes=2000)


def works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(
    not works("unshare", "--mount", "true"), reason="this user may not make mount namespaces"
)


async def fails_with(bench: Bench, within: tuple[str, ...], reason: str) -> None:
    """The coordinator ends with a status and a reason, and the trainer with it."""
    coordinator = await bench.start_coordinator(within=within)
    trainer = bench.start_trainer()
    bench.actor("a1", script=HEAVY)
    assert await coordinator.end() != 0
    trainer.kill()
    assert "a commit failed, nothing more is acknowledged" in coordinator.output()
    assert reason in coordinator.output()
    assert "Traceback" not in coordinator.output()


SMALL_DISK = """
    saved=$1; run=$2; size=$3; shift 3
    cp "$run/config.toml" "$saved.toml" && mount -t tmpfs -o "size=$size" none "$run" || exit 99
    cp "$saved.toml" "$run/config.toml"
    "$@"
    status=$?
    cp -a "$run" "$saved"
    exit $status
"""


def on_a_disk_of(size: str, bench: Bench, saved: Path) -> tuple[str, ...]:
    """A command that runs another with its run folder on a small disk, which is copied to `saved` at the end."""
    return ("unshare", "--mount", "sh", "-c", SMALL_DISK, "sh", str(saved), str(bench.run_dir), size)


@needs_mounts
async def test_a_full_disk_ends_the_coordinator_and_with_space_it_goes_on(tmp_path: Path):
    saved = tmp_path / "saved"
    disk = dataclasses.replace(NO_LIMITS, ballast_bytes=2 * MEBIBYTE)
    async with Bench(tmp_path, num_steps=60, fleet=RESTART_FLEET, disk=disk) as bench:
        await fails_with(bench, on_a_disk_of("5m", bench, saved), "full")
        assert_closed(saved)
        shutil.copytree(saved, bench.run_dir, dirs_exist_ok=True)
        await bench.start()
        await bench.trained()
        bench.check()


def assert_closed(folder: Path) -> None:
    """With the ballast's room SQLite brought its log into the database, and deleted it."""
    assert (folder / "ledger.sqlite").exists()
    assert not (folder / "ledger.sqlite-wal").exists()
    assert not (folder / "ledger.ballast").exists()


@needs_mounts
async def test_a_filling_disk_stops_leases_and_then_ends_the_run_in_order(tmp_path: Path):
    saved, size = tmp_path / "saved", 256 * MEBIBYTE
    # SQLite's log alone takes up to 64 MiB, and grows between two looks at the disk.
    disk = DiskConfig(warn_at=0.45, stop_leases_at=0.5, end_run_at=0.8, ballast_bytes=2 * MEBIBYTE)
    async with Bench(tmp_path, num_steps=2000, fleet=RESTART_FLEET, disk=disk) as bench:
        coordinator = await bench.start_coordinator(within=on_a_disk_of("256m", bench, saved))
        trainer = bench.start_trainer(step_seconds=0.2)
        bench.actor("a1")
        # The mount is seen by the coordinator alone.
        folder = Path(f"/proc/{coordinator.pid}/root/{bench.run_dir}")
        await bench.reached(2)
        fill(folder, 0.55 * size)
        await until(lambda: "leases stop until there is room" in coordinator.output(), "leases to stop")
        fill(folder, 0)
        await until(lambda: "leases are granted again" in coordinator.output(), "leases to be granted again")
        # What had been leased before is good for fewer steps than that.
        reached = (await bench.status()).version.step + 5
        await bench.reached(reached)
        fill(folder, 0.85 * size)
        assert await coordinator.end() == LedgerError.exit_status
        trainer.kill()
        assert "the run ends while its ledger can still be closed" in coordinator.output()
        assert "Traceback" not in coordinator.output()
        assert_closed(saved)
        (saved / "filler").unlink()
        shutil.copytree(saved, bench.run_dir, dirs_exist_ok=True)
        bench.schedule = dataclasses.replace(bench.schedule, num_steps=reached + 20)
        await bench.start()
        await bench.trained()
        bench.check()
        assert [event for event in bench.events("disk") if "the run ends" in event]


def fill(folder: Path, num_bytes: float) -> None:
    """Makes the disk be used so far by what lies in it, and a file."""
    usage = shutil.disk_usage(folder)
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    missing = round(num_bytes) - (usage.total - shutil.disk_usage(folder).free)
    if missing > 0:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, missing)


async def half_a_run(bench: Bench) -> None:
    """Ends as a power cut would: the write-ahead log is left behind."""
    await bench.start()
    bench.actor("a1")
    await bench.reached(4)
    assert bench.coordinator is not None
    assert bench.trainer is not None
    bench.coordinator.kill()
    bench.trainer.kill()


@pytest.mark.parametrize("tail", ["garbage", "half a frame"])
async def test_a_torn_tail_of_the_log_is_cut_and_nothing_acknowledged_is_lost(tmp_path: Path, tail: str):
    async with Bench(tmp_path, num_steps=8, fleet=RESTART_FLEET) as bench:
        await half_a_run(bench)
        log = bench.run_dir / "ledger.sqlite-wal"
        written = log.read_bytes()
        frame = random.Random(0).randbytes(9000) if tail == "garbage" else written[32:9032]
        log.write_bytes(written + frame)
        await bench.start()
        await bench.trained()
        bench.check()


@pytest.mark.slow
async def test_a_flipped_bit_in_the_database_is_refused_at_the_start(tmp_path: Path):
    async with Bench(tmp_path, num_steps=8, fleet=RESTART_FLEET) as bench:
        await bench.start()
        bench.actor("a1", script=HEAVY)
        await bench.reached(4)
        assert bench.trainer is not None
        bench.trainer.kill()
        await bench.abandon("a1")
        await bench.stop_coordinator()
        path = bench.run_dir / "ledger.sqlite"
        # A flip in a page that holds nothing goes unnoticed, and does nothing.
        in_use = [page - 1 for (page,) in bench.rows("SELECT pageno FROM dbstat")]
        sound = path.read_bytes()
        rng = random.Random(0)
        for page in rng.sample(in_use, 2):
            flipped = bytearray(sound)
            flipped[page * 65536 + rng.randrange(65536)] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            await refuses_to_start(bench)
        path.write_bytes(sound)
        await bench.start()
        bench.actor("a2")
        await bench.trained()
        bench.check()


async def refuses_to_start(bench: Bench) -> None:
    with pytest.raises(AssertionError, match="coordinator ended"):
        await bench.start_coordinator()
    assert bench.coordinator is not None
    await until(lambda: bench.coordinator.status is not None, "the end")
    assert bench.coordinator.status != 0
    assert "ledger.sqlite" in bench.coordinator.output()
