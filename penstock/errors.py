"""Every error that penstock raises on purpose.

    PenstockError
    ├── ConfigError (ValueError)      a setting, file or flag that cannot be used; exit status 2
    ├── ProtocolError                 a peer said what the contract forbids
    ├── Stopped                       asked to stop before there was work to drain; exit status 0
    ├── PeerLost                      a peer is gone, or did not answer by a deadline
    ├── SequenceGap                   items of a session are missing; send them again
    ├── FleetFull                     no room for another actor now; try again
    ├── SessionFenced                 a newer session took over
    ├── LedgerError                   the ledger cannot be trusted to be durable; fatal; exit status 4
    ├── WeightTransferError           a version did not arrive whole; fetch again
    ├── TrainingDiverged              step after step is not finite; exit status 3
    ├── NoProgress                    nothing moves any more; exit status 70, and to be started again
    ├── EngineFault                   an engine failed while generating
    └── EnvironmentFault              an environment failed; carries the kind of fault

A message says what was got, what was expected, and what to do.
"""

from enum import StrEnum


class PenstockError(Exception):
    """The root of the tree."""

    exit_status = 1
    """Of a program that ends with this error."""


class ConfigError(PenstockError, ValueError):
    """A setting, file or flag that cannot be used."""

    exit_status = 2


class ProtocolError(PenstockError):
    """A peer said what the contract forbids."""


class Stopped(PenstockError):
    """Asked to stop while waiting for a peer, before there was any work to drain. An orderly end."""

    exit_status = 0


class PeerLost(PenstockError):
    """A peer is gone, or did not answer by a deadline."""


class SequenceGap(PenstockError):
    """Items of a session were lost on the way, or overtaken: send again from the first unacknowledged."""


class FleetFull(PenstockError):
    """The learner takes no more actors now. There may be room later."""


class SessionFenced(PenstockError):
    """A newer session of the same actor or trainer took over; this one must stop."""


class LedgerError(PenstockError):
    """The ledger cannot be trusted to be durable. Fatal: exit and replay, never retry."""

    exit_status = 4


class WeightTransferError(PenstockError):
    """A version did not arrive whole. Nothing was changed; fetch again."""


class TrainingDiverged(PenstockError):
    """Step after step has a non-finite loss or gradient. Starting again would not help."""

    exit_status = 3


class NoProgress(PenstockError):
    """Nothing moves any more, for longer than can be right. Starting again may help."""

    exit_status = 70


class EngineFault(PenstockError):
    """An engine failed while generating."""


class FaultKind(StrEnum):
    """Who is at fault decides what a retry can do."""

    INFRASTRUCTURE = "infrastructure"
    """A machine, process or network: retry elsewhere."""
    DATA = "data"
    """The task itself: a retry will not help for long."""


class EnvironmentFault(PenstockError):
    """An environment failed. Never a reward."""

    def __init__(self, message: str, *, kind: FaultKind = FaultKind.INFRASTRUCTURE) -> None:
        super().__init__(message)
        self.kind = kind


class EnvironmentFull(EnvironmentFault):
    """It had no room for another session by the deadline, which is nobody's fault."""
