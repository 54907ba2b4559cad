"""What an actor tells the learner at its interval: that it lives, and how far its rollouts are.

With it go pieces of long rollouts, for others to go on from, and what the engine has done: one
that stands still is noticed here.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from actors.engines.base import Engine
from actors.install import Installer
from actors.rollout import ENGINE_SECONDS, Player, Progress, Running
from actors.session import Session
from actors.streaming import Streamer
from actors.uplink import Uplink
from penstock.codec import stats_to_wire, version_to_wire
from penstock.errors import NoProgress
from penstock.rpc import to_duration
from penstock.v1 import coordinator_pb2 as pb
from penstock.waits import Waits, WaitSummary

_log = logging.getLogger(__name__)

_PIECE_SECONDS = 0.25
"""Between two heartbeats that bring pieces of rollouts, at the least."""
MAX_WAITS_TOLD = 8


class Standstill:
    """An engine that is asked for tokens and makes none."""

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._num_tokens = -1
        self._moved_at = 0.0

    def is_over(self, *, asked_seconds: float, num_tokens: int, now: float) -> bool:
        """asked_seconds: for how long the oldest request waits. Did nothing move for `seconds`?"""
        if num_tokens != self._num_tokens:
            self._num_tokens, self._moved_at = num_tokens, now
        return min(asked_seconds, now - self._moved_at) >= self._seconds


class Heartbeat:
    """The heartbeats of one actor."""

    def __init__(
        self,
        *,
        session: Session,
        engine: Engine,
        installer: Installer,
        uplink: Uplink,
        players: Mapping[str, Player],
        running: Mapping[str, Running],
        waits: Waits,
        streamer: Streamer,
        seconds: float,
        on_standstill: Callable[[NoProgress], None],
    ) -> None:
        """running: the rollouts by lease. seconds: the interval. on_standstill: called once."""
        self._session = session
        self._engine = engine
        self._installer = installer
        self._uplink = uplink
        self._players = players
        self._running = running
        self._waits = waits
        self._streamer = streamer
        self._seconds = seconds
        self._standstill = Standstill(seconds=ENGINE_SECONDS)
        self._on_standstill = on_standstill
        self._is_given_up = False

    async def run(self) -> None:
        """At its interval, and sooner if there is much to tell of a long rollout."""
        due_at = 0.0
        while True:
            if time.monotonic() >= due_at or self._streamer.is_due(self._streamed()):
                await self._session.call(self._beat)
                due_at = time.monotonic() + self._seconds
            await asyncio.sleep(min(_PIECE_SECONDS, max(due_at - time.monotonic(), 0.01)))

    def _streamed(self) -> dict[str, Progress]:
        """Those that another actor could go on from; an evaluation's begin anew."""
        return {
            name: running.progress for name, running in self._running.items() if running.lease.pin is None
        }

    async def _beat(self, session_id: str) -> None:
        installed = self._installer.installed
        stats = self._engine.stats()
        waits = self._waits.summary()
        now = time.monotonic()
        running = [_report(lease_id, each.progress, now) for lease_id, each in self._running.items()]
        spooled = [pb.LeaseProgress(lease_id=lease_id) for lease_id in self._uplink.held_leases()]
        answer: pb.HeartbeatResponse = await self._session.stub.Heartbeat(
            pb.HeartbeatRequest(
                session_id=session_id,
                installed=None if installed is None else version_to_wire(installed[0]),
                progress=[*running, *spooled],
                stats=stats_to_wire(stats),
                num_unacknowledged=self._uplink.num_unacknowledged,
                waits=[
                    pb.ActorWait(
                        what=wait.what,
                        owner=wait.owner,
                        count=wait.count,
                        longest=to_duration(wait.longest_seconds),
                        limit=to_duration(wait.limit_seconds),
                    )
                    for wait in waits[:MAX_WAITS_TOLD]
                ],
                environments=[
                    pb.EnvironmentUse(
                        name=name,
                        num_answers=player.num_answers,
                        waited=to_duration(player.waited_seconds),
                    )
                    for name, player in self._players.items()
                ],
                pieces=self._streamer.pieces(self._streamed()),
                weights=pb.WeightsUse(
                    medium=self._installer.came_over, num_versions=self._installer.num_fetched
                ),
            ),
            timeout=10.0,
        )
        self._streamer.answered(answer.held)
        self._watch_engine(waits, stats.num_tokens)

    def _watch_engine(self, waits: Sequence[WaitSummary], num_tokens: int) -> None:
        asked = max((wait.longest_seconds for wait in waits if wait.what == "tokens"), default=0.0)
        if not self._is_given_up and self._standstill.is_over(
            asked_seconds=asked, num_tokens=num_tokens, now=time.monotonic()
        ):
            self._is_given_up = True
            failure = NoProgress(f"the engine was asked for tokens and made none for {asked:.0f} s")
            _log.critical("%s; leaving", failure)
            faulthandler.dump_traceback(all_threads=True)
            self._on_standstill(failure)


def _report(lease_id: str, progress: Progress, now: float) -> pb.LeaseProgress:
    message = pb.LeaseProgress(
        lease_id=lease_id, num_tokens=progress.num_tokens, num_turns=progress.num_turns
    )
    if progress.environment_since is not None:
        message.environment_wait.CopyFrom(to_duration(now - progress.environment_since))
    return message
