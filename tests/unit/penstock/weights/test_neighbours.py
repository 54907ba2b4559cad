"""Fetchers of one host. Two in one process lock each other out as two processes do."""

from __future__ import annotations

import dataclasses
import errno
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import HostTensor, Manifest, ZeromqMedium
from penstock.weights.media.zeromq import ZeromqReceiver, ZeromqServer
from penstock.weights.neighbours import Neighbours
from penstock.weights.segment import find_segments, segment_folder
from penstock.weights.version_log import VersionLog
from tests.weight_fixtures import CHUNK, ObservedReceiver, assert_holds, flip_byte, moved, tensors

SECONDS = 60.0


class Learner:
    def __init__(self) -> None:
        self._log = VersionLog(name_prefix=f"penstock-test-{secrets.token_hex(4)}", chunk_bytes=CHUNK)
        self._server = ZeromqServer("tcp://127.0.0.1:0")

    def publish(self, step: int, content: list[HostTensor]) -> Manifest:
        """As actors of another host see it."""
        written = self._log.write(PolicyVersion(1, step), content, with_delta=True)
        self._server.add(written)
        return dataclasses.replace(written, media=(ZeromqMedium(endpoint=self._server.endpoint),))

    @property
    def num_sent(self) -> int:
        return self._server.stats().num_chunks

    def answer_all(self) -> None:
        """Returns when what was asked for by who is gone is answered too."""
        num_sent = -1
        while num_sent != self.num_sent:
            num_sent = self.num_sent
            time.sleep(0.1)

    def close(self) -> None:
        self._server.close()
        self._log.close()


@pytest.fixture
def learner() -> Iterator[Learner]:
    learner = Learner()
    yield learner
    learner.close()


@pytest.fixture
def prefix() -> Iterator[str]:
    prefix = f"penstock-test-fetched-{secrets.token_hex(4)}"
    yield prefix
    assert not find_segments(prefix)
    assert not list(segment_folder().glob(f"{prefix}*"))


MakeFetcher = Callable[..., WeightFetcher]


@pytest.fixture
def make_fetcher(prefix: str) -> Iterator[MakeFetcher]:
    made = []

    def make(
        *, before: Callable[[int], None] = lambda _: None, turn_seconds: float = SECONDS
    ) -> WeightFetcher:
        neighbours = Neighbours(prefix=prefix, turn_seconds=turn_seconds)
        made.append(WeightFetcher([ObservedReceiver(ZeromqReceiver(), before=before)], neighbours=neighbours))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_version_crosses_the_network_once_for_all_actors_of_a_host(
    learner: Learner, make_fetcher: MakeFetcher
) -> None:
    """A whole one, and then a delta."""
    fetchers = [make_fetcher() for _ in range(3)]
    content = tensors()
    with ThreadPoolExecutor(len(fetchers)) as threads:
        for step in range(4):
            manifest = learner.publish(step, content)
            before = learner.num_sent
            fetched = [threads.submit(each.fetch, manifest, timeout_seconds=SECONDS) for each in fetchers]
            for each in fetched:
                assert_holds(each.result(), content)
            assert learner.num_sent - before == (1 if step else len(manifest.chunk_digests))
            content = moved(content, step)


def test_what_a_neighbour_holds_is_verified(learner: Learner, make_fetcher: MakeFetcher, prefix: str) -> None:
    manifest = learner.publish(0, tensors())
    make_fetcher().fetch(manifest, timeout_seconds=SECONDS)
    (path,) = find_segments(prefix)
    flip_byte(path.name, 2 * CHUNK)
    before = learner.num_sent
    assert_holds(make_fetcher().fetch(manifest, timeout_seconds=SECONDS), tensors())
    assert learner.num_sent - before == 1


def test_a_version_that_is_half_here_is_found_by_nobody(learner: Learner, make_fetcher: MakeFetcher) -> None:
    def cut(number: int) -> None:
        if number == 3:
            raise WeightTransferError("the line was cut")

    manifest = learner.publish(0, tensors())
    with pytest.raises(WeightTransferError, match="cut"):
        make_fetcher(before=cut).fetch(manifest, timeout_seconds=SECONDS)
    learner.answer_all()
    before = learner.num_sent
    assert_holds(make_fetcher().fetch(manifest, timeout_seconds=SECONDS), tensors())
    assert learner.num_sent - before == len(manifest.chunk_digests)


def test_who_waits_too_long_for_a_neighbour_fetches_for_itself(
    learner: Learner, make_fetcher: MakeFetcher
) -> None:
    in_the_middle, go_on = threading.Event(), threading.Event()

    def hang(number: int) -> None:
        in_the_middle.set()
        assert go_on.wait(SECONDS)

    manifest = learner.publish(0, tensors())
    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(make_fetcher(before=hang).fetch, manifest, timeout_seconds=SECONDS)
        assert in_the_middle.wait(SECONDS)
        assert_holds(make_fetcher(turn_seconds=0.1).fetch(manifest, timeout_seconds=SECONDS), tensors())
        with pytest.raises(WeightTransferError, match="out of time"):
            make_fetcher().fetch(manifest, timeout_seconds=0.1)
        go_on.set()
        assert_holds(hanging.result(), tensors())


KILLED_IN_ITS_TURN = """
import os, signal, sys, threading
from penstock.trajectory import PolicyVersion
from penstock.weights.media.base import Patience
from penstock.weights.neighbours import Neighbours
from penstock.weights.staged import stage
from tests.weight_fixtures import tensors

neighbours = Neighbours(prefix=sys.argv[1])
manifest = stage(PolicyVersion(1, 0), tensors()).manifest
buffer = neighbours.make_buffer()
buffer.prepare(manifest)
with neighbours.turn(manifest, Patience(deadline=float("inf"), abandoned=threading.Event())):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_actor_that_is_killed_in_its_turn_holds_nobody_up_and_leaves_nothing(
    learner: Learner, make_fetcher: MakeFetcher, prefix: str
) -> None:
    root = Path(__file__).parents[4]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_ITS_TURN, prefix], cwd=root, check=False, timeout=SECONDS
    )
    assert killed.returncode < 0
    assert list(segment_folder().glob(f"{prefix}.*.turn"))
    assert find_segments(prefix)
    manifest = learner.publish(0, tensors())
    assert_holds(make_fetcher().fetch(manifest, timeout_seconds=SECONDS), tensors())


def test_without_room_in_shared_memory_everybody_fetches(
    learner: Learner, make_fetcher: MakeFetcher, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    manifest = learner.publish(0, tensors())
    before = learner.num_sent
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    for _ in range(2):
        assert_holds(make_fetcher().fetch(manifest, timeout_seconds=SECONDS), tensors())
    assert learner.num_sent - before == 2 * len(manifest.chunk_digests)
    assert not find_segments(prefix)


def test_the_trainers_own_host_spends_no_more_shared_memory(learner: Learner, prefix: str) -> None:
    """A manifest that names a segment of this host: what is fetched comes from there."""
    written = learner._log.write(PolicyVersion(1, 0), tensors())
    fetcher = WeightFetcher(neighbours=Neighbours(prefix=prefix))
    assert_holds(fetcher.fetch(written, timeout_seconds=SECONDS), tensors())
    assert not find_segments(prefix)
    fetcher.close()
