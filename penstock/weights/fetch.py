"""Brings a version to this process: whole and verified, or not at all.

What a medium does not bring is asked of the next one; what it brought counts.
Two buffers take turns: what was fetched last stays intact while the next version is
staged in the other. A chunk that either buffer holds already is not fetched again, and
from another host deltas or adapters are fetched instead of what they can make.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.errors import WeightTransferError
from penstock.weights.adapting import Adapting
from penstock.weights.buffer import ChunkBuffer
from penstock.weights.catching_up import CatchingUp
from penstock.weights.manifest import CollectiveMedium, Manifest, Medium, SharedMemoryMedium, ZeromqMedium
from penstock.weights.media.base import Patience, WeightReceiver
from penstock.weights.media.collective import CollectiveReceiver
from penstock.weights.media.shared_memory import SharedMemoryReceiver
from penstock.weights.media.zeromq import ZeromqReceiver
from penstock.weights.neighbours import Neighbours
from penstock.weights.staged import StagedWeights

_log = logging.getLogger(__name__)

_ATTEMPTS_PER_MEDIUM = 2
_NAMES: dict[type[Medium], str] = {
    SharedMemoryMedium: "shared",
    ZeromqMedium: "zeromq",
    CollectiveMedium: "broadcast",
}


class WeightFetcher:
    """Fetches versions one after another. Blocks: call it in a thread.

    What `fetch` returned stays intact until the fetch after the next one.
    """

    def __init__(
        self, receivers: Sequence[WeightReceiver] | None = None, *, neighbours: Neighbours | None = None
    ) -> None:
        """
        receivers: one a medium; without them, shared memory and ZeroMQ.
        neighbours: fetchers of this host, to fetch over the network once for all of them.
        """
        given = (SharedMemoryReceiver(), ZeromqReceiver()) if receivers is None else receivers
        self._receivers: dict[type[Medium], WeightReceiver] = {
            receiver.medium: receiver for receiver in given
        }
        self._neighbours = neighbours
        self.came_over = ""
        """How the version that was fetched last came: names of media, joined by "+"."""
        self.num_fetched: Counter[str] = Counter()
        """Versions by how they came."""
        make_buffer = ChunkBuffer if neighbours is None else neighbours.make_buffer
        self._newest, self._spare = make_buffer(), make_buffer()
        self._catching_up = CatchingUp()
        self._adapting = Adapting()

    def fetch(
        self,
        manifest: Manifest,
        *,
        timeout_seconds: float,
        in_place: bool = False,
        abandoned: threading.Event | None = None,
    ) -> StagedWeights:
        """Tries the manifest's media in order, for the chunks that are not here already.

        in_place: take a version of this host as it lies there, without a copy and unverified.
        abandoned: set when the version is wanted no more; ends the fetch early.
        Raises WeightTransferError; then what was fetched before is unchanged.
        """
        patience = Patience(
            deadline=time.monotonic() + timeout_seconds, abandoned=abandoned or threading.Event()
        )
        if in_place and (buffer := self._in_place(manifest)) is not None:
            self._note(("shared",))
            return StagedWeights(manifest=manifest, buffer=buffer, verified=False)
        staging = self._spare
        staging.prepare(manifest, self._newest)
        self._note(self._fetch_missing(manifest, staging, patience))
        self._newest, self._spare = staging, self._newest
        return StagedWeights(manifest=manifest, buffer=staging.packed)

    def close(self) -> None:
        for receiver in self._receivers.values():
            receiver.close()
        if self._neighbours is not None:
            self._neighbours.close()

    def _note(self, names: Sequence[str]) -> None:
        self.came_over = "+".join(names) or "held"
        self.num_fetched[self.came_over] += 1

    def _in_place(self, manifest: Manifest) -> NDArray[np.uint8] | None:
        for medium, receiver in self._usable(manifest):
            if isinstance(medium, CollectiveMedium):
                return None
            if isinstance(medium, SharedMemoryMedium) and isinstance(receiver, SharedMemoryReceiver):
                try:
                    return receiver.in_place(manifest, medium)
                except WeightTransferError as error:
                    _log.debug("version %s does not lie on this host: %s", manifest.version, error)
        return None

    def _usable(self, manifest: Manifest) -> Iterator[tuple[Medium, WeightReceiver]]:
        """The media that this end understands, and for broadcasts is a member of."""
        for medium in manifest.media:
            receiver = self._receivers.get(type(medium))
            if receiver is None:
                continue
            if isinstance(receiver, CollectiveReceiver):
                assert isinstance(medium, CollectiveMedium)
                if not receiver.has(medium):
                    continue
            yield medium, receiver

    def _fetch_missing(self, manifest: Manifest, staging: ChunkBuffer, patience: Patience) -> list[str]:
        """Returns the names of the media that brought something."""
        failures: list[str] = []
        names: list[str] = []
        for medium, receiver in self._usable(manifest):
            before = len(staging.missing())
            if not before:
                break
            name = _NAMES[type(medium)]
            try:
                if isinstance(medium, ZeromqMedium):
                    name = self._fetch_once(receiver, medium, manifest, staging, patience)
                else:
                    _fetch_over(receiver, medium, manifest, staging, patience)
            except WeightTransferError as error:
                patience.check(f"version {manifest.version}")
                failures.append(f"{type(medium).__name__}: {error}")
                _log.warning("version %s over %s: %s", manifest.version, type(medium).__name__, error)
            if len(staging.missing()) < before:
                names.append(name)
        staging.show()
        if staging.missing():
            raise WeightTransferError(
                f"version {manifest.version}: {len(staging.missing())} of {len(manifest.chunk_digests)} chunks "
                f"did not arrive: {'; '.join(failures) or 'no medium of it is known here'}"
            )
        return names

    def _fetch_once(
        self,
        receiver: WeightReceiver,
        medium: Medium,
        manifest: Manifest,
        staging: ChunkBuffer,
        patience: Patience,
    ) -> str:
        """Over the network, unless another fetcher of this host has it or is about to. Returns how."""
        name = _NAMES[type(medium)]
        if self._neighbours is None:
            self._fetch_remote(receiver, medium, manifest, staging, patience)
            return name
        with self._neighbours.turn(manifest, patience):
            self._neighbours.copy(staging)
            if not staging.missing():
                return "neighbour"
            self._fetch_remote(receiver, medium, manifest, staging, patience)
            staging.show()
        return name

    def _fetch_remote(
        self,
        receiver: WeightReceiver,
        medium: Medium,
        manifest: Manifest,
        staging: ChunkBuffer,
        patience: Patience,
    ) -> None:
        self._take_changes(receiver, medium, manifest, staging, patience)
        if staging.missing():
            _fetch_over(receiver, medium, manifest, staging, patience)

    def _take_changes(
        self,
        receiver: WeightReceiver,
        medium: Medium,
        manifest: Manifest,
        staging: ChunkBuffer,
        patience: Patience,
    ) -> None:
        """Makes what deltas or adapters make of what is held. What they do not make stays missing."""
        way = self._catching_up if manifest.adapter is None else self._adapting
        try:
            way.advance(receiver, medium, self._newest, staging, patience)
        except WeightTransferError as error:
            patience.check("what changed")
            _log.warning("no deltas or adapters: %s; fetching the version whole", error)
            staging.prepare(manifest, self._newest)


def _fetch_over(
    receiver: WeightReceiver, medium: Medium, manifest: Manifest, staging: ChunkBuffer, patience: Patience
) -> None:
    """Asks twice: a chunk that the trainer overwrote as it was read is corrupt, then gone."""
    for _ in range(_ATTEMPTS_PER_MEDIUM):
        missing = staging.missing()
        for index, data in receiver.chunks(manifest, medium, missing, patience):
            staging.put(index, data)
        if not staging.missing():
            return
    raise WeightTransferError(
        f"{len(staging.missing())} chunks arrived with another digest than the manifest's"
    )
