"""ZeroMQ passes the suite that every medium passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from penstock.weights.manifest import Manifest, ZeromqMedium
from penstock.weights.media.base import WeightReceiver
from penstock.weights.media.zeromq import ZeromqReceiver, ZeromqServer
from tests.conformance.weight_transport_suite import WeightTransportSuite
from tests.ipv6 import needs_ipv6


class TestZeromq(WeightTransportSuite):
    server: ZeromqServer
    bind = "tcp://127.0.0.1:0"

    @pytest.fixture(autouse=True)
    def serve(self) -> Iterator[None]:
        self.server = ZeromqServer(self.bind)
        yield
        self.server.close()

    def offer(self, manifest: Manifest) -> Manifest:
        self.server.add(manifest)
        return dataclasses.replace(manifest, media=(ZeromqMedium(endpoint=self.server.endpoint),))

    def make_receiver(self) -> WeightReceiver:
        return ZeromqReceiver()


@needs_ipv6
class TestZeromqOverIpv6(TestZeromq):
    """A server on all addresses is reached at the one that its receiver knows."""

    bind = "tcp://[::]:0"

    def make_receiver(self) -> WeightReceiver:
        return ZeromqReceiver(host="::1")
