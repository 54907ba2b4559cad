"""Who may call what on which session: a state machine without sockets or processes.

The caller names a session and its fence. `begin_*` decides about a call: it returns
the call's record, new or repeated, or raises SessionRefused. The service keeps what
becomes of a new call in `Call.outcome`, so that a repeated call finds the same answer,
finished or still on its way. `fail` takes back a call that came to nothing.

    reset --> open --step--> open ... --step (done)--> finished
      any of them --close, expiry, lost--> gone (remembered for a while by its fence)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from penstock.errors import PenstockError
from penstock.trajectory import Task

OwnerT = TypeVar("OwnerT")
OutcomeT = TypeVar("OutcomeT")

_NUM_REMEMBERED = 65_536


class Refusal(StrEnum):
    FENCED = "fenced"
    """A higher fence holds the session."""
    LOST = "lost"
    """No such session, or no longer."""
    CONFLICT = "conflict"
    """Another call stands at this place of the session."""
    FULL = "full"
    """Too many sessions are open."""


class SessionRefused(PenstockError):
    """A call that the session's rules forbid."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        super().__init__(message)
        self.refusal = refusal


@dataclass(slots=True, eq=False)
class Call(Generic[OutcomeT]):
    """One reset or step, and what became of it."""

    key: bytes
    """Equal for repetitions of the call."""
    outcome: OutcomeT | None = None
    answered: bool = False


@dataclass(slots=True, eq=False)
class Session(Generic[OwnerT, OutcomeT]):
    session_id: str
    fence: int
    task: Task
    expires_at: float
    reset: Call[OutcomeT]
    owner: OwnerT | None = None
    """What runs the session's code; released by the service."""
    last_step: Call[OutcomeT] | None = None
    num_steps: int = 0
    done: bool = False

    @property
    def busy(self) -> bool:
        return not self.reset.answered or (self.last_step is not None and not self.last_step.answered)


@dataclass(slots=True)
class SessionTable(Generic[OwnerT, OutcomeT]):
    """All sessions of a server."""

    ttl_seconds: float
    max_sessions: int
    """0 when unbounded."""
    clock: Callable[[], float]
    """Monotonic, in seconds."""
    _open: dict[str, Session[OwnerT, OutcomeT]] = field(default_factory=dict)
    _gone: OrderedDict[str, int] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._open)

    def begin_reset(
        self, session_id: str, fence: int, task: Task
    ) -> tuple[Session[OwnerT, OutcomeT], Session[OwnerT, OutcomeT] | None]:
        """Opens a session, or finds the one that this very call opened.

        Also returns the session of a lower fence that it replaces, to be released.
        A new session's `owner` and `reset.outcome` are None.
        """
        session = self._open.get(session_id)
        if session is not None and fence == session.fence:
            if task != session.task:
                raise SessionRefused(
                    Refusal.CONFLICT,
                    f"session {session_id} is on {session.task}, not on {task}; raise the fence",
                )
            self._touch(session)
            return session, None
        if session is None:
            self._refuse_gone(session_id, fence)
            self._refuse_full()
        else:
            self._refuse_lower(session, fence)
            self.drop(session)
        opened: Session[OwnerT, OutcomeT] = Session(
            session_id=session_id, fence=fence, task=task, expires_at=0.0, reset=Call(key=b"")
        )
        self._gone.pop(session_id, None)
        self._open[session_id] = opened
        self._touch(opened)
        return opened, session

    def begin_step(
        self, session_id: str, fence: int, step_index: int, action: str
    ) -> tuple[Session[OwnerT, OutcomeT], Call[OutcomeT]]:
        """Finds the call at `step_index`, or begins it. A new call's `outcome` is None."""
        session = self._find(session_id, fence)
        self._touch(session)
        key = hashlib.sha256(action.encode()).digest()
        if session.last_step is not None and step_index == session.num_steps - 1:
            if key != session.last_step.key:
                raise SessionRefused(Refusal.CONFLICT, f"step {step_index} was taken with another action")
            return session, session.last_step
        if step_index != session.num_steps:
            raise SessionRefused(
                Refusal.CONFLICT,
                f"step_index is {step_index}; the next step of {session_id} is {session.num_steps}",
            )
        if session.done:
            raise SessionRefused(Refusal.CONFLICT, f"the episode of {session_id} is done; close it")
        if session.busy:
            raise SessionRefused(Refusal.CONFLICT, f"the call before step {step_index} has no answer yet")
        session.last_step = Call(key=key)
        session.num_steps += 1
        return session, session.last_step

    def answer(self, session: Session[OwnerT, OutcomeT], call: Call[OutcomeT], *, done: bool) -> None:
        """The call came to an end; `done` ends the episode."""
        call.answered = True
        session.done = session.done or done
        self._touch(session)

    def fail(self, session: Session[OwnerT, OutcomeT], call: Call[OutcomeT], *, recoverable: bool) -> bool:
        """The call came to nothing. True if the session is gone with it, and is to be released.

        A session that can be recovered takes back its step, which may then be asked for again.
        """
        if recoverable and call is session.last_step:
            session.last_step = None
            session.num_steps -= 1
            self._touch(session)
            return False
        return self.drop(session)

    def renew(self, session_id: str, fence: int) -> None:
        self._touch(self._find(session_id, fence))

    def close(self, session_id: str, fence: int) -> Session[OwnerT, OutcomeT] | None:
        """Ends a session. Returns it if it was open, to be released."""
        session = self._open.get(session_id)
        if session is None:
            return None
        self._refuse_lower(session, fence)
        self.drop(session)
        return session

    def drop(self, session: Session[OwnerT, OutcomeT]) -> bool:
        """Forgets a session but for its fence. True if it was open."""
        if self._open.get(session.session_id) is not session:
            return False
        del self._open[session.session_id]
        self._gone[session.session_id] = session.fence
        while len(self._gone) > _NUM_REMEMBERED:
            self._gone.popitem(last=False)
        return True

    def expire(self) -> list[Session[OwnerT, OutcomeT]]:
        """Drops the sessions without a call for the time-to-live; a call under way keeps its own deadline."""
        now = self.clock()
        expired = [
            session for session in self._open.values() if session.expires_at <= now and not session.busy
        ]
        for session in expired:
            self.drop(session)
        return expired

    def _find(self, session_id: str, fence: int) -> Session[OwnerT, OutcomeT]:
        session = self._open.get(session_id)
        if session is None:
            if fence < self._gone.get(session_id, 0):
                raise SessionRefused(Refusal.FENCED, f"fence {fence} of session {session_id} was replaced")
            raise SessionRefused(
                Refusal.LOST, f"session {session_id} is not open: it expired, was closed or was lost"
            )
        self._refuse_lower(session, fence)
        if fence > session.fence:
            raise SessionRefused(
                Refusal.LOST,
                f"session {session_id} is open under fence {session.fence}, not {fence}; reset it first",
            )
        return session

    def _refuse_lower(self, session: Session[OwnerT, OutcomeT], fence: int) -> None:
        if fence < session.fence:
            raise SessionRefused(
                Refusal.FENCED,
                f"fence {fence} of session {session.session_id} was replaced by {session.fence}",
            )

    def _refuse_gone(self, session_id: str, fence: int) -> None:
        last = self._gone.get(session_id)
        if last is None or fence > last:
            return
        if fence < last:
            raise SessionRefused(
                Refusal.FENCED, f"fence {fence} of session {session_id} was replaced by {last}"
            )
        raise SessionRefused(
            Refusal.LOST, f"session {session_id} is gone; reset it under a higher fence than {fence}"
        )

    def _refuse_full(self) -> None:
        if self.max_sessions and len(self._open) >= self.max_sessions:
            raise SessionRefused(
                Refusal.FULL, f"{len(self._open)} sessions are open, which is the limit; wait"
            )

    def _touch(self, session: Session[OwnerT, OutcomeT]) -> None:
        session.expires_at = self.clock() + self.ttl_seconds
