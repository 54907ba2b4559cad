"""ZeroMQ passes the suite that every medium passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from penstock.weights.manifest import Manifest, ZeromqMedium
from penstock.weights.media.base import WeightReceiver
from penstock.weights.media.zeromq import ZeromqReceiver, ZeromqServer
from tests.conformance.weight_transport_suite import WeightTransportSuite


class TestZeromq(WeightTransportSuite):
    server: ZeromqServer

    @pytest.fixture(autouse=True)
    def serve(self) -> Iterator[None]:
        self.server = ZeromqServer("tcp://127.0.0.1:0")
        yield
        self.server.close()

    def offer(self, manifest: Manifest) -> Manifest:
        self.server.add(manifest)
        return dataclasses.replace(manifest, media=(ZeromqMedium(endpoint=self.server.endpoint),))

    def make_receiver(self) -> WeightReceiver:
        return ZeromqReceiver()
