"""Which actors keep the version that is evaluated, while all others go on. Pure.

An actor of an evaluation holds its version: it installs no other until the coordinator, or
the evaluation's deadline, lets it go. Training leases on it go on meanwhile, under that
version. Never more than a share of the fleet holds at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from learner.coordinator.evaluation.evaluation import Evaluation
from learner.coordinator.fleet import Session
from penstock.trajectory import PolicyVersion

ARRIVAL_SECONDS = 300.0
"""For an actor that was chosen to have the version installed, from when it was chosen."""
TURN_SECONDS = 15.0
"""For an actor with a newer version to turn back: one that asks for work under that later does not."""


@dataclass(frozen=True, slots=True)
class Change:
    """Names of actors."""

    chosen: tuple[str, ...] = ()
    let_go: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    """Let go because they did not come to the version in time."""


class Holders:
    """Sessions by id, each with the time at which it was chosen."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._since: dict[str, float] = {}
        self._late: set[str] = set()

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._since

    def __len__(self) -> int:
        return len(self._since)

    def clear(self) -> None:
        self._since.clear()
        self._late.clear()

    def most(self, sessions: Sequence[Session]) -> int:
        return max(1, math.floor(self._share * len(sessions)))

    def num_slots(self, sessions: Sequence[Session]) -> int:
        """Leases of an evaluation that may be live at a time."""
        return max(1, math.ceil(self._share * sum(session.info.num_slots for session in sessions)))

    def take(self, session: Session, version: PolicyVersion, sessions: Sequence[Session], now: float) -> bool:
        """One that has the version installed asks for work: it may hold if there is room, or instead of one
        that was chosen and has not come to the version yet.
        """
        if session.session_id in self._since:
            return True
        if len(self._since) >= self.most(sessions):
            absent = [s for s in sessions if s.session_id in self._since and s.installed != version]
            if not absent:
                return False
            del self._since[absent[0].session_id]
        self._since[session.session_id] = now
        return True

    def choose(
        self,
        evaluation: Evaluation,
        sessions: Sequence[Session],
        num_leases: Callable[[str], int],
        *,
        num_free: int,
        is_held: bool,
        now: float,
    ) -> Change:
        """Lets go whom the evaluation needs no more; chooses others in their place.

        num_leases: of the evaluation, by session. num_free: questions that may be leased now. is_held:
        the version can be fetched. Then an actor that went on to a newer one turns back, if there is
        nobody else.
        """
        live = {session.session_id: session for session in sessions}
        let_go, late = [], []
        for session_id, since in list(self._since.items()):
            session = live.get(session_id)
            if session is None:
                del self._since[session_id]
            elif session.installed != evaluation.version and now - since > ARRIVAL_SECONDS:
                del self._since[session_id]
                self._late.add(session_id)
                late.append(session.info.actor_id)
            elif not num_free and num_leases(session_id) == 0:
                del self._since[session_id]
                let_go.append(session.info.actor_id)
        chosen = self._fill(evaluation, sessions, num_free, is_held, now) if num_free else []
        return Change(tuple(chosen), tuple(let_go), tuple(late))

    def asked(self, session: Session, evaluation: Evaluation, installed: PolicyVersion, now: float) -> bool:
        """An actor asks for work; True if it was chosen, went on to a newer version, and stays there."""
        since = self._since.get(session.session_id)
        if since is None or installed <= evaluation.version or now - since <= TURN_SECONDS:
            return False
        del self._since[session.session_id]
        self._late.add(session.session_id)
        return True

    def is_hopeless(self, sessions: Sequence[Session]) -> bool:
        """There are actors, and each of them was chosen once and did not come to the version."""
        return bool(sessions) and all(session.session_id in self._late for session in sessions)

    def _fill(
        self, evaluation: Evaluation, sessions: Sequence[Session], num_free: int, is_held: bool, now: float
    ) -> list[str]:
        room = self.most(sessions) - len(self._since)
        able = [
            session
            for session in sessions
            if session.session_id not in self._since
            and session.session_id not in self._late
            and session.installed is not None
            and not session.draining
        ]
        ready = [session for session in able if session.installed == evaluation.version]
        behind = [s for s in able if s.installed is not None and s.installed < evaluation.version]
        wanted = (ready + behind if is_held else ready)[: max(room, 0)]
        if not wanted and not self._since and is_held:
            wanted = able[:1]
        # No more than there is work for.
        slots_an_actor = max(1, max((session.info.num_slots for session in sessions), default=1))
        most = max(1, math.ceil(num_free / slots_an_actor)) - len(self._since)
        wanted = wanted[: max(most, 0)]
        for session in wanted:
            self._since[session.session_id] = now
        return [session.info.actor_id for session in wanted]
