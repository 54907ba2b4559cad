"""Broadcasts over gloo pass the suite that every medium passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import pytest

from penstock.broadcast.words import EventKind
from penstock.weights.manifest import HostTensor, Manifest
from penstock.weights.media.base import WeightReceiver
from penstock.weights.media.collective import CollectiveReceiver
from penstock.weights.segment import SegmentRing
from tests.broadcast_groups import MEDIUM, Group, take
from tests.conformance.weight_transport_suite import WeightTransportSuite
from tests.weight_fixtures import CHUNK


class _Shared(CollectiveReceiver):
    """The group's receiver, which a fetcher of one test does not close for the others."""

    def __init__(self, inner: CollectiveReceiver) -> None:
        self.__dict__ = inner.__dict__

    def close(self) -> None: ...


class TestCollective(WeightTransportSuite):
    group: ClassVar[Group]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def gather(cls) -> Iterator[None]:
        cls.group = Group(1, piece_bytes=CHUNK)
        yield
        cls.group.close()

    def publish(self, ring: SegmentRing, step: int, content: list[HostTensor]) -> Manifest:
        """Faults are to happen where the receiver has the version from."""
        manifest = super().publish(ring, step, content)
        began = self.group.members[0].began[-1]
        assert began.digest == manifest.digest
        self.segment = began.segment
        return manifest

    def offer(self, manifest: Manifest) -> Manifest:
        self.group.sender.send(manifest)
        assert self.group.sender.next(EventKind.SENT).digest == manifest.digest
        assert not take(self.group.receivers[0], manifest).missing()
        return dataclasses.replace(manifest, media=(MEDIUM,))

    def make_receiver(self) -> WeightReceiver:
        return _Shared(self.group.receivers[0])
