"""Brings announced versions into the engine: fetch, verify, install, confirm.

Only the newest announcement counts, but a fetch that began runs to its end: were it
given up for each newer version, a slow link would never install any. A transfer that
fails changes nothing; it is tried again, with the newest manifest, until it works.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping

from actors.engines.base import Engine
from penstock.codec import manifest_from_wire
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.v1 import weights_pb2
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import Manifest

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5


class Installer:
    """Keeps the engine at the newest announced version."""

    def __init__(self, engine: Engine, fetcher: WeightFetcher, *, fetch_seconds: float = 300.0) -> None:
        self._engine = engine
        self._fetcher = fetcher
        self._fetch_seconds = fetch_seconds
        # What the trainer has on this host need not be copied for an engine that verifies its own copy.
        self._in_place = engine.verifies
        self._announced: Manifest | None = None
        self._changed = asyncio.Event()
        self._abandoned = threading.Event()
        self.installed: tuple[PolicyVersion, str] | None = None
        """Version and digest of what the engine generates with, as confirmed by it."""
        self.installed_event = asyncio.Event()
        """Set, and replaced, at each install."""

    @property
    def came_over(self) -> str:
        """By which media the newest version came."""
        return self._fetcher.came_over

    @property
    def num_fetched(self) -> Mapping[str, int]:
        """Versions by the media that they came over."""
        return self._fetcher.num_fetched.copy()

    def announce(self, message: weights_pb2.WeightManifest) -> None:
        """Notes a published version. Raises ProtocolError."""
        manifest = manifest_from_wire(message)
        self._announced = manifest
        self._changed.set()

    async def run(self) -> None:
        """Installs what is announced, until cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                manifest = self._announced
                if manifest is not None and not self._is_installed(manifest):
                    await self._try(manifest)
        finally:
            # A cancelled task does not end the thread that fetches.
            self._abandoned.set()

    async def _try(self, manifest: Manifest) -> None:
        try:
            await self._install(manifest)
        except WeightTransferError as error:
            # In place it may have been overwritten, or be corrupt there: the next one is fetched whole.
            self._in_place = False
            _log.warning("version %s is not installed: %s; trying again", manifest.version, error)
            self._changed.set()
            await asyncio.sleep(_RETRY_SECONDS)

    def _is_installed(self, manifest: Manifest) -> bool:
        return self.installed == (manifest.version, manifest.digest)

    async def _install(self, manifest: Manifest) -> None:
        staged = await asyncio.to_thread(
            self._fetcher.fetch,
            manifest,
            timeout_seconds=self._fetch_seconds,
            in_place=self._in_place,
            abandoned=self._abandoned,
        )
        report = await self._engine.install(staged)
        if report.digest != manifest.digest:
            raise WeightTransferError(
                f"the engine installed digest {report.digest}; version {manifest.version} has {manifest.digest}"
            )
        self._in_place = self._engine.verifies
        self.installed = (report.version, report.digest)
        _log.debug("installed %s, pause %.1f ms", report.version, report.pause_seconds * 1000)
        self.installed_event.set()
        self.installed_event = asyncio.Event()
