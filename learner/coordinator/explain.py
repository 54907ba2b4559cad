"""Who waits for whom, for how long, and what would end it: `penstock why`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from learner.coordinator.breaker import NUM_PROBES, BreakerState
from learner.coordinator.decisions import Waiting
from learner.coordinator.fleet import ActorState, Session
from learner.coordinator.groups import Group
from learner.coordinator.scheduler import Scheduler

WORTH_TELLING_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerWait:
    """What the trainer did last, as the coordinator saw it."""

    since: float
    """Monotonic seconds."""
    waiting: Waiting | None
    """None while it trains."""


def why(scheduler: Scheduler, trainer: TrainerWait | None, now: float) -> list[str]:
    """From the learner outwards; each line names what would end the wait before it."""
    lines = list(_learner(scheduler, trainer, now))
    if trainer is not None and trainer.waiting is not None and not scheduler.finished:
        lines += _groups(scheduler, trainer.waiting.groups, now)
    lines += _evaluation(scheduler, now)
    lines += _actors(scheduler, now)
    lines += _environments(scheduler, now)
    return lines


def _learner(scheduler: Scheduler, trainer: TrainerWait | None, now: float) -> Iterator[str]:
    if scheduler.finished:
        yield "nothing: the run is finished"
    elif trainer is None or scheduler.version is None:
        yield "the coordinator waits for the trainer to publish its first version"
    elif trainer.waiting is None:
        yield f"the learner trains step {scheduler.version.step} since {now - trainer.since:.1f} s"
    else:
        yield f"the learner waits since {now - trainer.since:.1f} s for {trainer.waiting.reason}"
    if scheduler.paused:
        yield "an operator paused the run: no leases are granted until `penstock resume`"
    if scheduler.no_room:
        yield f"no leases are granted until there is room: {scheduler.no_room}"


def _groups(scheduler: Scheduler, groups: Iterable[Group], now: float) -> Iterator[str]:
    """The unfinished groups' missing slots, gathered by the actor that holds them."""
    held: defaultdict[str, list[str]] = defaultdict(list)
    stalled: dict[str, tuple[float, float]] = {}
    unleased = 0
    for group in groups:
        unleased += sum(slot.is_free for slot in group.slots)
        for lease in filter(None, map(scheduler.leases.get, (i for s in group.slots for i in s.lease_ids))):
            session = scheduler.fleet.find(lease.session_id)
            name = session.info.actor_id if session else "an actor that has not joined again"
            held[name].append(lease.lease_id)
            quiet, left = stalled.get(name, (0.0, lease.deadline - now))
            stalled[name] = (max(quiet, now - lease.progress_at), min(left, lease.deadline - now))
    for name, leases in sorted(held.items(), key=lambda item: -len(item[1])):
        quiet, left = stalled[name]
        yield (
            f"{len(leases)} slots are with {name}: no progress for up to {quiet:.1f} s; the first lease "
            f"expires in {max(left, 0.0):.0f} s"
        )
    if unleased:
        yield f"{unleased} slots are free: they wait for an actor with room"


def _evaluation(scheduler: Scheduler, now: float) -> Iterator[str]:
    """What an open evaluation waits for."""
    evaluations = scheduler.evaluations
    evaluation = evaluations.open
    if evaluation is None:
        return
    missing = sum(not slot.is_settled for slot in evaluation.slots)
    leased = Counter(
        session.info.actor_id if session else "an actor that has not joined again"
        for session in (scheduler.fleet.find(lease.session_id) for lease in evaluations.leases)
    )
    parts = [f"{count} are with {name}" for name, count in leased.most_common()]
    if evaluation.num_free:
        num_holders = len(evaluations.holders)
        who = f"one of the {num_holders} actors that hold it" if num_holders else "an actor that installs it"
        parts.append(f"{evaluation.num_free} are free, and wait for room on {who}")
    yield (
        f"the evaluation of version {evaluation.version} waits since {now - evaluation.opened_at:.1f} s for "
        f"{missing} of {evaluation.num_slots} answers: {'; '.join(parts) or 'their results are on the way'}; it "
        f"ends with what is there in {evaluations.seconds_left(now):.0f} s"
    )


def _actors(scheduler: Scheduler, now: float) -> Iterator[str]:
    sessions = scheduler.fleet.sessions()
    if not sessions and not scheduler.finished:
        yield "no actor is connected: start one with `penstock actor --learner HOST:PORT`"
    for session in sessions:
        yield from _actor(scheduler, session, now)


def _environments(scheduler: Scheduler, now: float) -> Iterator[str]:
    for name, watched in sorted(scheduler.outages.environments.items()):
        breaker, faults = watched.breaker, watched.faults
        if breaker.state is BreakerState.OPEN:
            due = breaker.probe_due_seconds(now)
            yield f"environment {name} is left out: {breaker.reason}; it is tried again in {due:.0f} s"
        elif breaker.state is BreakerState.PROBING:
            yield f"environment {name} is tried with {NUM_PROBES} rollouts; it was left out: {breaker.reason}"
        if faults.last:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(faults.counts.items()))
            yield f"environment {name} had faults ({counts}); the last: {faults.last}"


def _actor(scheduler: Scheduler, session: Session, now: float) -> Iterator[str]:
    """What one actor waits for, as far as it is worth a line."""
    name, silent = session.info.actor_id, now - session.heard_at
    state = scheduler.fleet.state(session, now)
    if state is ActorState.SUSPECT:
        left = max(scheduler.fleet.dead_seconds - silent, 0.0)
        yield f"{name} is silent for {silent:.1f} s; its leases are granted again in {left:.0f} s"
    elif state is ActorState.INSTALLING:
        yield f"{name} has not installed a version yet"
    leases = (scheduler.leases, scheduler.evaluations.leases)
    if session.refusal and not any(table.of_session(session.session_id) for table in leases):
        yield f"{name} asks for work and gets none: {session.refusal}"
    if session.num_unacknowledged >= scheduler.fleet.credit_trajectories:
        yield (
            f"{name} holds {session.num_unacknowledged} unacknowledged items and has no credits left: it waits for "
            "the ledger to write them"
        )
    for wait in session.waits:
        if wait.what != "a lease" and wait.longest_seconds >= WORTH_TELLING_SECONDS:
            left = max(wait.limit_seconds - wait.longest_seconds, 0.0)
            yield (
                f"{name}: {wait.count} waiting for {wait.what} from {wait.owner}, for up to "
                f"{wait.longest_seconds:.0f} s; given up in {left:.0f} s"
            )
