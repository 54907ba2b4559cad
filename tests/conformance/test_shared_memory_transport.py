"""Shared memory passes the suite that every medium passes."""

from __future__ import annotations

from penstock.weights.manifest import Manifest
from penstock.weights.media.base import WeightReceiver
from penstock.weights.media.shared_memory import SharedMemoryReceiver
from tests.conformance.weight_transport_suite import WeightTransportSuite


class TestSharedMemory(WeightTransportSuite):
    def offer(self, manifest: Manifest) -> Manifest:
        return manifest

    def make_receiver(self) -> WeightReceiver:
        return SharedMemoryReceiver()
