"""Brings announced versions into the engine: fetch, verify, install, confirm.

Only the newest announcement counts, but a fetch that began runs to its end: were it
given up for each newer version, a slow link would never install any. A transfer that
fails changes nothing; it is tried again, with the newest manifest, until it works.

While an evaluation holds a version, that one counts instead, also if it is older than what
is installed. Rollouts that are pinned to the installed version keep it in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from actors.engines.base import Engine
from penstock.codec import manifest_from_wire
from penstock.errors import WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.v1 import weights_pb2
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import Manifest

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
_MAX_HELD_FAILURES = 3
"""Of transfers of a held version in a row: it may be gone where it lay, and others are not."""


@dataclass(slots=True)
class _Held:
    version: PolicyVersion
    manifest: Manifest | None
    until: float
    """Monotonic seconds."""
    num_failures: int = 0


class Installer:
    """Keeps the engine at the newest announced version, or at one that is held."""

    def __init__(
        self,
        engine: Engine,
        fetcher: WeightFetcher,
        *,
        fetch_seconds: float = 300.0,
        may_install: Callable[[PolicyVersion], bool] = lambda version: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """may_install: whether what is being generated allows to switch to a version now; `look` asks again."""
        self._engine = engine
        self._fetcher = fetcher
        self._fetch_seconds = fetch_seconds
        self.may_install = may_install
        self._clock = clock
        # What the trainer has on this host need not be copied for an engine that verifies its own copy.
        self._in_place = engine.verifies
        self._announced: Manifest | None = None
        self._held: _Held | None = None
        self._settled = asyncio.Event()
        self._settled.set()
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

    def hold(
        self, version: PolicyVersion, message: weights_pb2.WeightManifest | None, *, seconds: float
    ) -> None:
        """Installs this version, and no other for so long. Without a manifest: if it is there. Raises ProtocolError."""
        manifest = None if message is None else manifest_from_wire(message)
        self._held = _Held(version, manifest, self._clock() + seconds)
        self._changed.set()

    def let_go(self) -> None:
        """Goes on to the newest announced version."""
        self._held = None
        self._changed.set()

    def look(self) -> None:
        """What is being generated changed: a version that waited for that may be installed now."""
        self._changed.set()

    def generates(self, version: PolicyVersion) -> bool:
        """Whether a rollout that begins now is of this version, and stays so while it is pinned to it."""
        return self._settled.is_set() and self.installed is not None and self.installed[0] == version

    async def settled(self) -> None:
        """Returns while the engine does not switch: at once, or when the switch is over."""
        await self._settled.wait()

    @property
    def hold_seconds(self) -> float:
        """What is left of a hold."""
        return 0.0 if self._held is None else max(self._held.until - self._clock(), 0.0)

    @property
    def turns_back(self) -> bool:
        """Whether an older version than the installed one is wanted, once nothing is generated any more."""
        target = self._target()
        return target is not None and self.installed is not None and target.version < self.installed[0]

    async def run(self) -> None:
        """Installs what is wanted, until cancelled."""
        try:
            while True:
                await self._wait()
                manifest = self._target()
                if manifest is not None and self._is_wanted(manifest):
                    await self._try(manifest)
        finally:
            # A cancelled task does not end the thread that fetches.
            self._abandoned.set()

    async def _wait(self) -> None:
        """For a change, or the end of a hold."""
        held = self._held
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if held is None else max(held.until - self._clock(), 0.0)):
                await self._changed.wait()
        self._changed.clear()

    def _target(self) -> Manifest | None:
        """What should be installed; None to stay as it is."""
        held = self._held
        if held is not None and held.until <= self._clock():
            held = self._held = None
        if held is None:
            return self._announced
        if self.installed is not None and self.installed[0] == held.version:
            return None
        return held.manifest or self._announced

    def _is_wanted(self, manifest: Manifest) -> bool:
        return self.installed != (manifest.version, manifest.digest) and self.may_install(manifest.version)

    def _may_switch(self, manifest: Manifest) -> bool:
        """To what was fetched, although something else may be announced by now."""
        target = self._target()
        is_held = self._held is not None
        if is_held and (target is None or target.version != manifest.version):
            return False
        return self._is_wanted(manifest)

    async def _try(self, manifest: Manifest) -> None:
        try:
            await self._install(manifest)
        except WeightTransferError as error:
            # In place it may have been overwritten, or be corrupt there: the next one is fetched whole.
            self._in_place = False
            _log.warning("version %s is not installed: %s; trying again", manifest.version, error)
            self._note_failure(manifest)
            self._changed.set()
            await asyncio.sleep(_RETRY_SECONDS)

    def _note_failure(self, manifest: Manifest) -> None:
        held = self._held
        if held is None or held.version != manifest.version:
            return
        held.num_failures += 1
        if held.num_failures >= _MAX_HELD_FAILURES:
            _log.warning("version %s cannot be had for its evaluation: going on", manifest.version)
            self._held = None

    async def _install(self, manifest: Manifest) -> None:
        staged = await asyncio.to_thread(
            self._fetcher.fetch,
            manifest,
            timeout_seconds=self._fetch_seconds,
            in_place=self._in_place,
            abandoned=self._abandoned,
        )
        if not self._may_switch(manifest):
            # Meanwhile an evaluation began, on what is installed or on another version.
            self._changed.set()
            return
        self._settled.clear()
        try:
            report = await self._engine.install(staged)
        finally:
            self._settled.set()
        if report.digest != manifest.digest:
            raise WeightTransferError(
                f"the engine installed digest {report.digest}; version {manifest.version} has {manifest.digest}"
            )
        self._in_place = self._engine.verifies
        self.installed = (report.version, report.digest)
        _log.debug("installed %s, pause %.1f ms", report.version, report.pause_seconds * 1000)
        self.installed_event.set()
        self.installed_event = asyncio.Event()
