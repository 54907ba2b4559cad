"""Actors' sessions: who is here, who is silent, who was fenced. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from learner.config import FleetConfig
from penstock.errors import FleetFull, PeerLost, SessionFenced
from penstock.trajectory import PolicyVersion
from penstock.waits import WaitSummary
from penstock.weights.manifest import WeightsMedium

JOINS_PER_SECOND = 100


class ActorState(StrEnum):
    INSTALLING = "installing"
    """Has not installed a version yet."""
    READY = "ready"
    SUSPECT = "suspect"
    """Silent for longer than a heartbeat should take."""
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorInfo:
    """What an actor says of itself when it joins."""

    actor_id: str
    engine: str
    num_slots: int
    address: str = ""
    hostname: str = ""
    pid: int = 0
    device: str = ""
    weights_medium: WeightsMedium = WeightsMedium.PULL


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedStats:
    num_running: int = 0
    num_waiting: int = 0
    num_tokens: int = 0
    tokens_per_second: float = 0.0
    num_installs: int = 0
    max_install_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsUse:
    """By which media an actor's versions came."""

    medium: str = ""
    """The newest one's."""
    num_versions: Mapping[str, int] = field(default_factory=dict)
    """Since the actor started."""


class EnvironmentUse(NamedTuple):
    """What one environment answered one actor, since the actor started."""

    environment: str
    num_answers: int = 0
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Session:
    session_id: str
    number: int
    info: ActorInfo
    heard_at: float
    installed: PolicyVersion | None = None
    stats: ReportedStats = field(default_factory=ReportedStats)
    weights: WeightsUse = field(default_factory=WeightsUse)
    draining: bool = False
    waits: tuple[WaitSummary, ...] = ()
    """What the actor told that it waits for, the longest first."""
    num_unacknowledged: int = 0
    refusal: str = ""
    """Why it got no lease when it asked last; empty if it got one."""
    num_asked: int = 0
    """Leases that it waits for: it asked, and there was no room."""
    last_sequence: int = 0
    """Of the items that were submitted and decided upon."""
    _uses: dict[str, EnvironmentUse] = field(default_factory=dict)

    def note_use(self, use: EnvironmentUse) -> tuple[int, float]:
        """Answers since the actor told last, and the seconds that they took in all."""
        known = self._uses.get(use.environment, EnvironmentUse(use.environment))
        self._uses[use.environment] = use
        return max(use.num_answers - known.num_answers, 0), max(use.seconds - known.seconds, 0.0)


class Fleet:
    """Sessions by id, at most one live for each actor."""

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._live: dict[str, Session] = {}
        self._fenced: dict[str, str] = {}
        self._joins_left = float(config.max_actors)
        self._joined_at: float | None = None

    @property
    def dead_seconds(self) -> float:
        return self._config.dead_seconds

    @property
    def credit_trajectories(self) -> int:
        return self._config.credit_trajectories

    def __len__(self) -> int:
        return len(self._live)

    def sessions(self) -> list[Session]:
        return sorted(self._live.values(), key=lambda session: session.number)

    def of_actor(self, actor_id: str) -> Session | None:
        return next((s for s in self._live.values() if s.info.actor_id == actor_id), None)

    def find(self, session_id: str) -> Session | None:
        return self._live.get(session_id)

    def admit(self, actor_id: str, now: float) -> None:
        """Bounds sessions, and how fast new ones come: each is written to the ledger. Raises FleetFull."""
        most = self._config.max_actors
        earned = 0.0 if self._joined_at is None else (now - self._joined_at) * JOINS_PER_SECOND
        self._joins_left, self._joined_at = min(self._joins_left + earned, float(most)), now
        if len(self._live) >= most and self.of_actor(actor_id) is None:
            raise FleetFull(f"{most} actors are connected; raise fleet.max_actors, or wait until one leaves")
        if self._joins_left < 1.0:
            raise FleetFull(f"more than {JOINS_PER_SECOND} actors a second join; wait for a turn")
        self._joins_left -= 1.0

    def join(self, session_id: str, number: int, info: ActorInfo, now: float) -> Session:
        session = Session(session_id=session_id, number=number, info=info, heard_at=now)
        self._live[session_id] = session
        return session

    def fence(self, session_id: str, newer: str) -> None:
        """Ends a session because a newer one of its actor joined."""
        self._live.pop(session_id, None)
        self._fenced[session_id] = newer
        while len(self._fenced) > 10_000:
            self._fenced.pop(next(iter(self._fenced)))

    def remove(self, session_id: str) -> Session | None:
        return self._live.pop(session_id, None)

    def require(self, session_id: str, now: float) -> Session:
        """The live session, noted as heard. Raises SessionFenced, PeerLost."""
        session = self._live.get(session_id)
        if session is None:
            if session_id in self._fenced:
                raise SessionFenced(
                    f"session {session_id} was replaced by {self._fenced[session_id]} of the same actor; "
                    "give each actor a name of its own"
                )
            raise PeerLost(f"session {session_id or '(none)'} is not known here; join again")
        session.heard_at = now
        return session

    def silent(self, now: float) -> list[Session]:
        """Sessions to be declared dead."""
        return [s for s in self._live.values() if now - s.heard_at >= self._config.dead_seconds]

    def state(self, session: Session, now: float) -> ActorState:
        if now - session.heard_at >= self._config.suspect_seconds:
            return ActorState.SUSPECT
        if session.draining:
            return ActorState.DRAINING
        return ActorState.INSTALLING if session.installed is None else ActorState.READY

    def shift(self, seconds: float, now: float) -> None:
        """Forgives everybody a pause of the learner itself; nobody is heard in the future."""
        for session in self._live.values():
            session.heard_at = min(session.heard_at + seconds, now)
