"""The ledger's disk fails, fills up, or tears: a clean end with the reason, and nothing acknowledged is lost."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from learner.coordinator.audit import audit
from learner.coordinator.ledger import Ledger
from learner.coordinator.records import (
    GroupOpened,
    LeaseGranted,
    SequenceAdvanced,
    SessionOpened,
    TrajectoryState,
    TrajectoryStored,
)
from penstock.codec import checksum
from penstock.errors import LedgerError
from penstock.trajectory import PolicyVersion, Task

from .bench import Bench
from .test_durable_steps import STRACE, needs_strace

pytestmark = needs_strace


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("fdatasync:error=EIO:when=12", "disk I/O error", id="a sync fails once"),
        pytest.param("pwrite64:error=ENOSPC:when=150+", "disk is full", id="the disk is full"),
        pytest.param("pwrite64:error=EROFS:when=150+", "disk I/O error", id="the disk is read-only"),
        pytest.param("writev:error=ENOSPC:when=3+", "disk is full", id="the disk is full for payloads"),
        pytest.param("writev:error=EIO:when=3", "disk I/O error", id="a payload cannot be written"),
    ],
)
async def test_a_disk_that_fails_ends_the_coordinator_with_its_reason(tmp_path: Path, fault: str, said: str):
    syscall = fault.partition(":")[0]
    async with Bench(tmp_path, num_steps=6) as bench:
        within = (*STRACE, "-e", f"trace={syscall}", "-e", f"inject={fault}")
        await bench.start_coordinator(within=within)
        bench.start_trainer()
        bench.actor("a1")
        assert bench.coordinator is not None
        assert await bench.coordinator.end() == 4
        assert "nothing more is acknowledged" in bench.coordinator.output()
        assert said in bench.coordinator.output()
        # The disk is well again; trainer and actor had stayed.
        await bench.start_coordinator()
        await bench.trained()
        bench.check()


def trajectory(number: int) -> TrajectoryStored:
    payload = random.Random(number).randbytes(20_000)
    return TrajectoryStored(
        trajectory_id=f"{number:032x}",
        group_id=number,
        slot=0,
        attempt=0,
        session_id="s",
        sequence=number + 1,
        state=TrajectoryState.PENDING,
        environment="words",
        oldest_step=0,
        num_sampled=3,
        mixed=False,
        reward=1.0,
        observation_digest="d",
        payload=payload,
        checksum=checksum(payload),
    )


def write(ledger: Ledger, number: int) -> None:
    lease = LeaseGranted(group_id=number, slot=0, attempt=0, session_id="s")
    opened = GroupOpened(
        group_id=number, task=Task("words", "train", 0, 1), born=PolicyVersion(1, 0), num_slots=1
    )
    ledger.write_blocking(
        [opened, lease, trajectory(number), SequenceAdvanced(session_id="s", sequence=number + 1)]
    )


TORN = ("ledger.sqlite-wal", "payloads/00000001.segment")


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_in_the_midst_of_a_commit_loses_nothing_that_was_acknowledged(tmp_path: Path, seed: int):
    """What was not synced yet is cut off at a random byte, or torn: some of it new, some of it noise."""
    source, path = tmp_path / "before" / "ledger.sqlite", tmp_path / "after" / "ledger.sqlite"
    chance = random.Random(seed)
    ledger = Ledger(source)
    ledger.write_blocking([SessionOpened(session_id="s", actor_id="a", number=1)])
    acknowledged = chance.randint(1, 5)
    for number in range(acknowledged):
        write(ledger, number)
    shutil.copytree(source.parent, path.parent)
    before = {name: (source.parent / name).read_bytes() for name in TORN}
    write(ledger, acknowledged)
    for name in TORN:
        data = (source.parent / name).read_bytes()
        kept = chance.randint(len(before[name]), len(data) - 1)
        noise = chance.randbytes(len(data) - kept) if seed % 2 else b""
        (path.parent / name).write_bytes(data[:kept] + noise)
    ledger.close()

    again = Ledger(path)
    assert {f"{number:032x}" for number in range(acknowledged)} <= set(again.trajectory_ids())
    for number in range(acknowledged):
        assert again.payloads(number, [f"{number:032x}"]) == [trajectory(number).payload]
    assert again.totals().imbalance == 0
    again.close()
    assert not audit(path).violations


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LedgerError, match="cannot be written"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


async def test_a_damaged_ledger_is_not_started_on(tmp_path: Path):
    async with Bench(tmp_path, num_steps=4) as bench:
        await bench.start()
        bench.actor("a1")
        await bench.trained()
        path = bench.run_dir / "ledger.sqlite"
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(AssertionError, match="does not have its checksum"):
            await bench.start_coordinator()
        assert bench.coordinator is not None
        assert bench.coordinator.status == 4
