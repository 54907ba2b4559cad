"""Versions that actors may fetch: announced here, served from the trainer's segments."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from penstock.codec import manifest_to_wire
from penstock.trajectory import PolicyVersion
from penstock.v1 import weights_pb2
from penstock.weights.manifest import Manifest, Medium, ZeromqMedium
from penstock.weights.media.zeromq import ZeromqServer

_log = logging.getLogger(__name__)

_NUM_VERSIONS = 4

Offer = Callable[[Manifest], Sequence[Medium]]


class Publications:
    """The newest manifests, and who sends their chunks."""

    def __init__(self, server: ZeromqServer, offer: Offer = lambda _: ()) -> None:
        """offer: begins to broadcast a version, and names how it may be taken, if there is anybody to take it."""
        self._server = server
        self._offer = offer
        self._manifests: dict[PolicyVersion, weights_pb2.WeightManifest] = {}

    @property
    def newest(self) -> weights_pb2.WeightManifest | None:
        return next(reversed(self._manifests.values()), None)

    @property
    def serves_other_hosts(self) -> bool:
        """Whether any actor has fetched over the network: then deltas are worth making."""
        return self._server.stats().num_chunks > 0

    def publish(self, manifest: Manifest) -> None:
        """Serves a version and announces it. Its journal record must be on disk.

        Raises WeightTransferError if the trainer's segment cannot be opened here.
        """
        self._server.add(manifest)
        media = (*self._offer(manifest), *manifest.media, ZeromqMedium(endpoint=self._server.endpoint))
        offered = manifest_to_wire(dataclasses.replace(manifest, media=media))
        self._manifests[manifest.version] = offered
        for old in list(self._manifests)[:-_NUM_VERSIONS]:
            del self._manifests[old]

    def get(self, version: PolicyVersion | None) -> weights_pb2.WeightManifest | None:
        """A version that is still held; the newest for None."""
        return self.newest if version is None else self._manifests.get(version)

    def withdraw(self) -> None:
        """Announces nothing until the next publication: a new trainer starts from elsewhere."""
        for version in self._manifests:
            self._server.remove(version)
        self._manifests.clear()
