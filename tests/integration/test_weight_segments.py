"""Segments across processes: a trainer that is killed, and the one after it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
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
