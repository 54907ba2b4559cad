"""Disks that are full, fail, or lie: no acknowledgement after an error, and nothing that was acknowledged is lost."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from .bench import RESTART_FLEET, Bench, until
from .scripted_actor import Script

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


FULL_DISK = """
    saved=$1; run=$2; shift 2
    cp "$run/config.toml" "$saved.toml" && mount -t tmpfs -o size=3m none "$run" || exit 99
    cp "$saved.toml" "$run/config.toml"
    "$@"
    status=$?
    cp -a "$run" "$saved"
    exit $status
"""


@needs_mounts
async def test_a_full_disk_ends_the_coordinator_and_with_space_it_goes_on(tmp_path: Path):
    saved = tmp_path / "saved"
    async with Bench(tmp_path, num_steps=60, fleet=RESTART_FLEET) as bench:
        within = ("unshare", "--mount", "sh", "-c", FULL_DISK, "sh", str(saved), str(bench.run_dir))
        await fails_with(bench, within, "full")
        shutil.copytree(saved, bench.run_dir, dirs_exist_ok=True)
        await bench.start()
        await bench.trained()
        bench.check()


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
