"""Segments that the actors of a host share. Two rings in one process lock each other out as two processes do."""

from __future__ import annotations

import errno
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.engines.host_ring import HostRing, prefix_of, remove_abandoned
from penstock.errors import WeightTransferError
from penstock.weights.manifest import SharedMemoryMedium
from penstock.weights.segment import find_segments, open_segment, segment_path

NUM_BYTES = 64


def digest(step: int) -> str:
    return f"{step + 1:064x}"


def writing(step: int, calls: list[int] | None = None) -> Callable[[NDArray[np.uint8]], str]:
    def write(payload: NDArray[np.uint8]) -> str:
        payload[:] = step
        if calls is not None:
            calls.append(step)
        return digest(step)

    return write


def hold(ring: HostRing, step: int, calls: list[int] | None = None) -> str:
    return ring.hold(digest(step), writing(step, calls), timeout_seconds=30)


def content(name: str) -> int:
    payload = open_segment(SharedMemoryMedium(name=name, nonce=""), NUM_BYTES).payload
    assert len(set(payload.tolist())) == 1
    return int(payload[0])


@pytest.fixture
def layout() -> str:
    return secrets.token_hex(8)


@pytest.fixture
def rings(layout: str) -> Iterator[tuple[HostRing, HostRing]]:
    first, second = (HostRing(layout=layout, num_bytes=NUM_BYTES) for _ in range(2))
    yield first, second
    first.close()
    second.close()


def test_what_one_actor_prepared_the_others_take(rings: tuple[HostRing, HostRing]) -> None:
    first, second = rings
    calls: list[int] = []
    name = hold(first, 1, calls)
    assert hold(second, 1, calls) == name
    assert calls == [1]
    assert content(name) == 1


def test_a_segment_is_reused_when_nobody_holds_it_any_more(rings: tuple[HostRing, HostRing]) -> None:
    first, second = rings
    old = hold(first, 1)
    assert hold(second, 1) == old
    new = hold(first, 2)
    first.release(old)
    third = hold(first, 3)
    assert len({old, new, third}) == 3, "a segment that the other actor holds was written to"
    assert content(old) == 1
    second.release(old)
    assert hold(second, 4) == old
    assert content(old) == 4


def test_a_version_that_is_held_twice_stays_until_both_end(rings: tuple[HostRing, HostRing]) -> None:
    first, second = rings
    name = hold(first, 1)
    assert hold(first, 1) == name
    first.release(name)
    assert hold(second, 2) != name
    first.release(name)
    assert hold(second, 3) == name


@pytest.mark.parametrize("fault", ["raises", "writes something else"])
def test_a_preparation_that_fails_leaves_what_is_held_and_is_found_by_nobody(
    rings: tuple[HostRing, HostRing], fault: str
) -> None:
    first, second = rings
    held = hold(first, 1)

    def write(payload: NDArray[np.uint8]) -> str:
        payload[: NUM_BYTES // 2] = 2
        if fault == "raises":
            raise WeightTransferError("as told")
        return digest(9)

    with pytest.raises(WeightTransferError):
        first.hold(digest(2), write, timeout_seconds=30)
    assert content(held) == 1
    calls: list[int] = []
    assert content(hold(second, 2, calls)) == 2
    assert calls == [2]


def test_without_room_in_shared_memory_actors_share_another_folder(
    rings: tuple[HostRing, HostRing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = os.posix_fallocate

    def reserve_little(file: int, offset: int, length: int) -> None:
        if Path(f"/proc/self/fd/{file}").readlink().is_relative_to("/dev/shm"):
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(file, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", reserve_little)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = rings
    name = hold(first, 1)
    assert segment_path(name) == tmp_path / name
    calls: list[int] = []
    assert hold(second, 1, calls) == name
    assert not calls
    assert content(name) == 1


def test_without_room_anywhere_what_is_held_stays(
    rings: tuple[HostRing, HostRing], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first, second = rings
    held = hold(first, 1)
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(WeightTransferError, match="No space left"):
            hold(first, 2)
        assert content(held) == 1
    assert content(hold(second, 2)) == 2


def test_one_actor_waits_while_another_prepares(rings: tuple[HostRing, HostRing]) -> None:
    first, second = rings
    writing_now, go_on = threading.Event(), threading.Event()

    def slowly(payload: NDArray[np.uint8]) -> str:
        writing_now.set()
        assert go_on.wait(timeout=30)
        return writing(1)(payload)

    taken: list[str] = []
    preparing = threading.Thread(
        target=lambda: taken.append(first.hold(digest(1), slowly, timeout_seconds=30))
    )
    preparing.start()
    assert writing_now.wait(timeout=30)
    with pytest.raises(WeightTransferError, match="another actor"):
        second.hold(digest(1), writing(1), timeout_seconds=0)
    go_on.set()
    calls: list[int] = []
    name = hold(second, 1, calls)
    preparing.join(timeout=30)
    assert [name] == taken
    assert calls == []


def test_the_last_to_leave_removes_the_files(layout: str) -> None:
    first, second = (HostRing(layout=layout, num_bytes=NUM_BYTES) for _ in range(2))
    hold(first, 1)
    first.close()
    assert len(find_segments(prefix_of(layout))) == 1
    assert content(hold(second, 1)) == 1
    second.close()
    assert find_segments(prefix_of(layout)) == []


_KILLED = """
import os, signal, sys
from actors.engines.host_ring import HostRing, prefix_of
from penstock.weights.segment import find_segments
def write(payload):
    payload[:32] = 7
    print(len(find_segments(prefix_of(sys.argv[1]))), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
HostRing(layout=sys.argv[1], num_bytes=64).hold(f"{2:064x}", write, timeout_seconds=30)
"""


def test_an_actor_that_is_killed_while_it_prepares_holds_nobody_up(layout: str) -> None:
    ring = HostRing(layout=layout, num_bytes=NUM_BYTES)
    held = hold(ring, 0)
    killed = subprocess.run([sys.executable, "-c", _KILLED, layout], timeout=60, check=False)
    assert killed.returncode == -9
    assert content(held) == 0
    calls: list[int] = []
    assert content(hold(ring, 1, calls)) == 1
    assert calls == [1]
    ring.close()


def test_what_killed_actors_left_behind_is_removed(layout: str) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, layout], stdout=subprocess.PIPE, timeout=60, check=False
    )
    assert killed.stdout == b"1\n"
    remove_abandoned()
    assert find_segments(prefix_of(layout)) == []
