"""Which actors versions are broadcast to: one group after another. Pure.

    nobody -> forming -> standing -> (a newcomer is steady) forming beside it -> standing
                 |           |
                 +-----------+--> failed: everybody pulls; the next group, without those at fault, after a while

A group is fixed: who joins or leaves is in, or out of, the next one. While a group forms, the one
that stands goes on, so that a newcomer costs the others nothing. Members that were at fault twice
are in no group any more.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from learner.config import WeightsConfig
from penstock.broadcast.words import Backend, Reason
from penstock.weights.manifest import WeightsMedium

MOST_FAULTS = 2
_BACKOFF_SECONDS = (2.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An actor, as it is now."""

    session_id: str
    actor_id: str
    medium: WeightsMedium
    """What it asked for."""
    device: str
    """"cpu", "cuda", ..."""
    is_ready: bool
    """Whether it has a version installed, is heard, and stays."""
    is_local: bool
    """Whether it has the trainer's shared memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    session_id: str
    actor_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    name: str
    backend: Backend
    seats: tuple[Seat, ...]
    """In the order of their ranks, from 1 on."""

    @property
    def size(self) -> int:
        return 1 + len(self.seats)

    def rank(self, session_id: str) -> int | None:
        ranks = (rank for rank, seat in enumerate(self.seats, 1) if seat.session_id == session_id)
        return next(ranks, None)


class Membership:
    """Told how actors are and how groups fare; says which group is to be formed."""

    def __init__(
        self, config: WeightsConfig, *, make_secret: Callable[[], str] = lambda: secrets.token_hex(8)
    ) -> None:
        self._config = config
        self._make_secret = make_secret
        self._steady_since: dict[str, float] = {}
        self._candidates: dict[str, Candidate] = {}
        self._num_faults: Counter[str] = Counter()
        self._failures_in_a_row = 0
        self._not_before = 0.0
        self._formed_at: float | None = None
        self._num_invited = 0
        self.device: str | None = None
        """The learner's, once a sender has told: "cpu" or "cuda"."""
        self.forming: Group | None = None
        self.standing: Group | None = None
        self.num_groups = 0
        self.num_broadcasts = 0
        self.fallbacks: Counter[str] = Counter()
        """By reason."""
        self.last_failure = ""

    def look(self, candidates: Sequence[Candidate], now: float) -> None:
        """Notes how actors are. Call it often."""
        self._candidates = {each.session_id: each for each in candidates}
        ready = {each.session_id for each in candidates if each.is_ready}
        self._steady_since = {
            session_id: self._steady_since.get(session_id, now) for session_id in sorted(ready)
        }

    def has_left(self, group: Group) -> list[str]:
        """Members whose sessions ended. One whose actor is silent still receives; should it fall silent itself,
        the sender tells."""
        return [seat.actor_id for seat in group.seats if seat.session_id not in self._candidates]

    def wants_group(self, now: float) -> bool:
        """Whether a sender is to be started for a new group."""
        if self.forming is not None or now < self._not_before:
            return False
        seats = self._seats(self.device or "cuda", now)
        if self.standing is None:
            return bool(seats)
        assert self._formed_at is not None
        newcomers = {seat.session_id for seat in seats} - {seat.session_id for seat in self.standing.seats}
        return bool(newcomers) and now - self._formed_at >= self._config.regroup_seconds

    def form(self, device: str, now: float) -> Group | None:
        """Who is invited, now that a sender listens and told its device; None if nobody is left."""
        self.device = device
        seats = self._seats(device, now)
        if not seats:
            return None
        self._num_invited += 1
        on_gpus = device == "cuda" and all(self._has_gpu(seat) for seat in seats)
        self.forming = Group(
            name=f"group-{self._num_invited}-{self._make_secret()}",
            backend=Backend.NCCL if on_gpus else Backend.GLOO,
            seats=tuple(seats),
        )
        return self.forming

    def formed(self, now: float) -> None:
        """The group that was forming takes the place of the one that stood."""
        assert self.forming is not None
        self.standing, self.forming = self.forming, None
        self._formed_at = now
        self.num_groups += 1

    def broadcast(self) -> None:
        """A version reached the standing group."""
        self.num_broadcasts += 1
        self._failures_in_a_row = 0

    def skipped(self) -> None:
        """The trainer overwrote a version before all of it was sent. The group stands."""
        self.fallbacks[Reason.OVERWRITTEN] += 1

    def failed(self, group: Group | None, reason: Reason, message: str, now: float) -> None:
        """The group is no more; None for one that nobody was invited to yet."""
        self._drop(group)
        self.fallbacks[reason] += 1
        self.last_failure = f"{reason}: {message}"
        first, most = _BACKOFF_SECONDS
        self._not_before = now + min(first * 2**self._failures_in_a_row, most)
        self._failures_in_a_row += 1

    def retired(self, group: Group) -> None:
        """The group ended in order: a member has left it. Nobody had to pull for that."""
        self._drop(group)

    def at_fault(self, group: Group, ranks: Sequence[int]) -> list[str]:
        """Counts the faults of a group that failed. Returns the actors that will only pull from now on."""
        names = [group.seats[rank - 1].actor_id for rank in ranks if 0 < rank <= len(group.seats)]
        self._num_faults.update(names)
        return [name for name in names if self._num_faults[name] == MOST_FAULTS]

    def _drop(self, group: Group | None) -> None:
        if group is self.standing:
            self.standing = None
        elif group is self.forming:
            self.forming = None

    def _seats(self, device: str, now: float) -> list[Seat]:
        """Who would be in a group that is formed now. Where there are GPUs, they are on their own."""
        steady = [
            each
            for session_id, each in self._candidates.items()
            if now - self._steady_since.get(session_id, now + 1.0) >= self._config.stable_seconds
            and self._num_faults[each.actor_id] < MOST_FAULTS
            and wants_broadcasts(self._config.medium, each, device)
        ]
        with_gpu = [each for each in steady if each.device.startswith("cuda")]
        chosen = with_gpu if device == "cuda" and with_gpu else steady
        return [Seat(session_id=each.session_id, actor_id=each.actor_id) for each in chosen]

    def _has_gpu(self, seat: Seat) -> bool:
        return self._candidates[seat.session_id].device.startswith("cuda")


def wants_broadcasts(run: WeightsMedium, actor: Candidate, device: str) -> bool:
    """device: the learner's."""
    if WeightsMedium.PULL in (run, actor.medium):
        return False
    if WeightsMedium.COLLECTIVE in (run, actor.medium):
        return True
    return device == "cuda" and actor.device.startswith("cuda") and not actor.is_local
