"""Segments across processes: a trainer that is killed, and the one after it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.codec import manifest_from_wire
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.v1 import weights_pb2
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import Manifest, SharedMemoryMedium
from penstock.weights.segment import SegmentRing, open_segment, segment_path
from penstock.weights.staged import stage
from tests.weight_fixtures import assert_holds, tensors

PREFIX = "penstock-test-killed"

TRAINER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from penstock.trajectory import PolicyVersion
from penstock.weights.segment import SegmentRing
from tests.weight_fixtures import tensors
assert "torch" not in sys.modules
medium = SegmentRing(name_prefix={prefix!r}).write(PolicyVersion(1, 0), tensors()).media[0]
print(medium.name, medium.nonce, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_trainers_version_is_readable_until_the_next_trainer_starts() -> None:
    source = TRAINER.format(root=str(Path(__file__).parents[2]), prefix=PREFIX)
    trainer = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    name, nonce = trainer.stdout.readline().split()
    manifest = _manifest(name, nonce)
    _assert_readable(manifest)
    other = SegmentRing(name_prefix=PREFIX)
    assert segment_path(name) is not None, "a living trainer's segment stays"
    other.close()

    trainer.stdin.write("\n")
    trainer.stdin.close()
    assert trainer.wait(timeout=60) != 0
    trainer.stdout.close()
    _assert_readable(manifest)

    following = SegmentRing(name_prefix=PREFIX)
    assert segment_path(name) is None
    with pytest.raises(WeightTransferError, match="not on this host"):
        open_segment(SharedMemoryMedium(name=name, nonce=nonce), manifest.num_bytes)
    following.close()


KILLED_WHILE_IT_WRITES = """
import os, signal, sys
sys.path.insert(0, {root!r})
from penstock.codec import manifest_to_wire
from penstock.trajectory import PolicyVersion
from penstock.weights.segment import SegmentRing
from tests.weight_fixtures import tensors
ring = SegmentRing(name_prefix={prefix!r}, num_segments=2)
for step in range(2):
    manifest = ring.write(PolicyVersion(1, step), tensors(seed=step))
    print(manifest_to_wire(manifest).SerializeToString().hex(), flush=True)

def write_half(payload):
    sys.stdin.readline()
    payload[: payload.size // 2] = 77
    os.kill(os.getpid(), signal.SIGKILL)

ring.fill(PolicyVersion(1, 2), manifest.tensors, manifest.num_bytes, write_half)
"""


def test_a_trainer_that_is_killed_while_it_writes_leaves_no_half_version_to_be_read() -> None:
    source = KILLED_WHILE_IT_WRITES.format(root=str(Path(__file__).parents[2]), prefix=PREFIX)
    trainer = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    overwritten, newest = (_received(trainer.stdout.readline()) for _ in range(2))
    trainer.communicate("\n", timeout=60)
    fetcher = WeightFetcher()
    for in_place in (False, True):
        with pytest.raises(WeightTransferError, match="did not arrive"):
            fetcher.fetch(overwritten, timeout_seconds=30, in_place=in_place)
    assert_holds(fetcher.fetch(newest, timeout_seconds=30), tensors(seed=1))
    following = SegmentRing(name_prefix=PREFIX)
    published = following.write(PolicyVersion(2, 0), tensors(seed=2))
    assert_holds(fetcher.fetch(published, timeout_seconds=30), tensors(seed=2))
    following.close()
    fetcher.close()


def _received(line: str) -> Manifest:
    return manifest_from_wire(weights_pb2.WeightManifest.FromString(bytes.fromhex(line)))


def _manifest(name: str, nonce: str) -> Manifest:
    """The manifest that the trainer made: its tensors are known here too."""
    staged = stage(PolicyVersion(1, 0), tensors())
    medium = SharedMemoryMedium(name=name, nonce=nonce)
    return Manifest(
        version=staged.manifest.version,
        tensors=staged.manifest.tensors,
        num_bytes=staged.manifest.num_bytes,
        chunk_bytes=staged.manifest.chunk_bytes,
        chunk_digests=staged.manifest.chunk_digests,
        digest=staged.manifest.digest,
        media=(medium,),
    )


def _assert_readable(manifest: Manifest) -> None:
    fetcher = WeightFetcher()
    assert_holds(fetcher.fetch(manifest, timeout_seconds=30), tensors())
    fetcher.close()
