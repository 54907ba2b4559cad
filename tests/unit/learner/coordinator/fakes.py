"""A run's scheduler with a clock of its own, and well-formed trajectories to submit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from learner.config import BreakerConfig, FleetConfig, ScheduleConfig
from learner.coordinator import submissions
from learner.coordinator.decisions import History
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.coordinator.evaluation.plan import Plan
from learner.coordinator.fleet import ActorInfo
from learner.coordinator.ledger import Recovered
from learner.coordinator.partials import SentPartial
from learner.coordinator.scheduler import Scheduler
from learner.coordinator.sieve import Sieve
from learner.coordinator.submissions import Sent, Submission
from learner.coordinator.tasks import TaskOrder, TaskSource
from learner.coordinator.validation import Limits, Rejected
from penstock.codec import checksum, partial_to_wire, trajectory_to_wire
from penstock.trajectory import (
    FinishReason,
    Lease,
    Partial,
    PolicyVersion,
    Reward,
    Sampling,
    Trajectory,
    VersionSpan,
)
from penstock.v1 import trajectory_pb2

LIMITS = Limits(vocab_size=50, max_sampled_tokens=16, max_context=64)
ENVIRONMENT = "words"
_ids = itertools.count(1)


class NoHistory:
    """A ledger that knows nothing of closed groups."""

    def trajectory_ids(self) -> tuple[str, ...]:
        return ()

    def was_granted(self, group_id: int, slot: int, attempt: int) -> bool:
        return False

    def was_evaluation_granted(self, number: int, slot: int, attempt: int) -> bool:
        return False


def make_scheduler(
    *,
    history: History | None = None,
    fleet: FleetConfig | None = None,
    breaker: BreakerConfig | None = None,
    environments: Sequence[str] = (ENVIRONMENT,),
    sieve: Sieve | None = None,
    evaluation: EvaluationConfig | None = None,
    plan: Plan | None = None,
    **schedule: int,
) -> Scheduler:
    defaults = {"num_steps": 100, "groups_per_step": 2, "group_size": 2, "max_lag": 1}
    return Scheduler(
        schedule=ScheduleConfig(**(defaults | schedule)),
        fleet=fleet or FleetConfig(),
        breaker=breaker or BreakerConfig(),
        sampling=Sampling(max_tokens=16),
        tasks=TaskOrder([TaskSource(environment=name, num_tasks=10) for name in environments], seed=0),
        limits=LIMITS,
        sieve=sieve,
        evaluation=evaluation,
        plan=plan,
        history=history or NoHistory(),
        wall_clock=lambda: 0.0,
    )


def start(scheduler: Scheduler, step: int = 0) -> PolicyVersion:
    """Opens a lineage and publishes its first version."""
    epoch = scheduler.lineage.open(step, [])
    scheduler.evaluations.lineage_opened()
    return publish(scheduler, PolicyVersion(epoch, step))


def publish(scheduler: Scheduler, version: PolicyVersion) -> PolicyVersion:
    assigned = scheduler.board.assigned
    group_ids = assigned.group_ids if assigned else ()
    scheduler.lineage.published(version, digest_of(version), b"", "{}", group_ids)
    scheduler.evaluations.published(version, digest_of(version), 0.0)
    return version


def restore(scheduler: Scheduler, found: Recovered, *, now: float = 0.0) -> None:
    """Goes on from what a ledger recovered."""
    scheduler.restore(
        epoch=found.epoch,
        from_step=found.from_step,
        num_sessions=found.num_sessions,
        next_group_id=found.next_group_id,
        open_groups=found.open_groups,
        assigned=found.assigned,
        live_leases=found.live_leases,
        versions=found.versions,
        paused=found.paused,
        now=now,
    )
    scheduler.evaluations.restore(found.evaluations, now)


def digest_of(version: PolicyVersion) -> str:
    """A version restored from a checkpoint has the tensors that it had."""
    return f"digest of step {version.step}"


def join(scheduler: Scheduler, name: str = "a", *, now: float = 0.0, held: tuple[str, ...] = ()) -> str:
    session_id = f"{name}#{next(_ids)}"
    scheduler.join(session_id, ActorInfo(actor_id=name, engine="fake", num_slots=8), held, now)
    return session_id


def acquire(
    scheduler: Scheduler, session_id: str, version: PolicyVersion, num: int = 100, *, now: float = 0.0
) -> list[Lease]:
    return scheduler.acquire(session_id, version, digest_of(version), num, now)[0]


def make_trajectory(lease: Lease, version: PolicyVersion, **changes: object) -> Trajectory:
    """Two prompt tokens and three sampled ones."""
    fields: dict[str, object] = {
        "trajectory_id": f"{next(_ids):032x}",
        "lease_id": lease.lease_id,
        "token_ids": np.array([1, 2, 3, 4, 5], dtype=np.int32),
        "loss_mask": np.array([0, 0, 1, 1, 1], dtype=np.uint8),
        "logprobs": np.array([0, 0, -0.5, -1.0, 0.0], dtype=np.float32),
        "versions": (VersionSpan(version, 3),),
        "reward": Reward.valid(1.0),
        "finish_reason": FinishReason.DONE,
        "num_turns": 1,
        "task": lease.task,
        "environment_version": "1",
        "environment_digest": "ab",
        "observation_digest": f"observation of {lease.task}",
    }
    return Trajectory(**(fields | changes))  # type: ignore[arg-type]


def make_message(lease: Lease, version: PolicyVersion, **changes: object) -> trajectory_pb2.Trajectory:
    return trajectory_to_wire(make_trajectory(lease, version, **changes))


def make_partial(lease: Lease, version: PolicyVersion, **changes: object) -> SentPartial:
    """Two prompt tokens and two sampled ones of a turn that is not finished."""
    fields: dict[str, object] = {
        "token_ids": np.array([1, 2, 3, 4], dtype=np.int32),
        "loss_mask": np.array([0, 0, 1, 1], dtype=np.uint8),
        "logprobs": np.array([0, 0, -0.5, -1.0], dtype=np.float32),
        "versions": (VersionSpan(version, 2),),
        "num_turns": 0,
        "cut": False,
        "environment_version": "1",
        "environment_digest": "ab",
        "observation_digest": f"observation of {lease.task}",
    }
    payload = partial_to_wire(Partial(**(fields | changes))).SerializeToString()  # type: ignore[arg-type]
    return SentPartial(payload, checksum(payload))


def read(message: trajectory_pb2.Trajectory) -> Submission | Rejected:
    """The message as an actor sends it, and as the coordinator reads it."""
    payload = message.SerializeToString()
    (submission,) = submissions.read([Sent(payload, checksum(payload))], LIMITS)
    return submission


class Submitter:
    """Numbers a session's items."""

    def __init__(self, scheduler: Scheduler, session_id: str) -> None:
        self.scheduler = scheduler
        self.session_id = session_id
        self.sequence = 0

    def __call__(self, message: trajectory_pb2.Trajectory, *, now: float = 0.0):  # type: ignore[no-untyped-def]
        self.sequence += 1
        return self.scheduler.docket.submit(self.session_id, self.sequence, read(message), now)

    def release(  # type: ignore[no-untyped-def]
        self,
        lease: Lease,
        outcome,
        message: str = "",
        *,
        now: float = 0.0,
        partial: SentPartial | None = None,
    ) -> None:
        self.sequence += 1
        self.scheduler.docket.release(
            self.session_id, self.sequence, lease.lease_id, outcome, message, now, partial
        )
