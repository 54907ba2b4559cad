"""What an operator may ask of a run: `penstock status`, `why`, `events`, `top`, `pause`, ...

Exit status: 0 done, 1 nobody answered or the answer was no, 2 the command line is wrong.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import grpc
import tyro
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from rich.console import Console
from rich.live import Live

from penstock import rpc
from penstock.cli.run_client import Peer, RunClient, explain
from penstock.cli.view import RewardHistory, line, render
from penstock.errors import ConfigError, PeerLost
from penstock.rpc import to_seconds
from penstock.signals import Stop
from penstock.v1 import actor_pb2
from penstock.v1 import operator_pb2 as pb
from penstock.v1.actor_pb2_grpc import ActorServiceStub

_REFRESH_SECONDS = 0.5
_PATIENCE_SECONDS = 15.0
_ACTOR = Peer("actor", "`penstock status --json` lists the actors' addresses")

ConfigT = TypeVar("ConfigT")
AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    learner: str = "127.0.0.1:7070"
    """HOST:PORT of the learner."""
    timeout_seconds: float = 5.0
    """Deadline of each call."""

    def __post_init__(self) -> None:
        _check_timeout(self.timeout_seconds)

    def connect(self) -> RunClient:
        return RunClient(self.learner, timeout_seconds=self.timeout_seconds)


def _check_timeout(seconds: float) -> None:
    if seconds <= 0:
        raise ConfigError(f"timeout_seconds is {seconds}; expected more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusTarget(Target):
    json: bool = False
    """Print the whole answer as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsTarget(Target):
    follow: bool = False
    """Go on with new events as they happen."""
    after: int = 0
    """Begin after the event of this number."""

    def __post_init__(self) -> None:
        Target.__post_init__(self)
        if not 0 <= self.after < 2**63:
            raise ConfigError(f"after is {self.after}; expected 0 (all) or the number of an event")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorTarget:
    actor: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="HOST:PORT")]
    """Where the actor answers operators; `penstock status --json` lists them."""
    timeout_seconds: float = 5.0
    """Deadline of the call."""

    def __post_init__(self) -> None:
        _check_timeout(self.timeout_seconds)


def status(argv: Sequence[str]) -> int:
    """Print a run's state."""
    target = _parse(StatusTarget, argv, "status")
    answer = asyncio.run(_ask(target, RunClient.status))
    if target.json:
        print(json.dumps(to_plain(answer), indent=2))
    else:
        rewards = RewardHistory()
        rewards.add(answer)
        Console().print(render(answer, rewards))
    return 0


def why(argv: Sequence[str]) -> int:
    """Say who waits for whom, for how long, and what would end it."""
    print(*asyncio.run(_ask(_parse(Target, argv, "why"), RunClient.why)), sep="\n")
    return 0


def events(argv: Sequence[str]) -> int:
    """Print what happened in a run."""
    asyncio.run(_print_events(_parse(EventsTarget, argv, "events")))
    return 0


def pause(argv: Sequence[str]) -> int:
    """Grant no more leases; what is leased goes on."""
    asyncio.run(_ask(_parse(Target, argv, "pause"), RunClient.pause))
    print("paused: no leases are granted until `penstock resume`")
    return 0


def resume(argv: Sequence[str]) -> int:
    """Grant leases again."""
    asyncio.run(_ask(_parse(Target, argv, "resume"), RunClient.resume))
    print("resumed")
    return 0


def checkpoint(argv: Sequence[str]) -> int:
    """Ask the trainer for a checkpoint before its next batch."""
    asyncio.run(_ask(_parse(Target, argv, "checkpoint"), RunClient.checkpoint))
    print("asked: the trainer writes a checkpoint before its next batch; `penstock events` tells when")
    return 0


def drain(argv: Sequence[str]) -> int:
    """Let one actor return its leases, send what it holds, and leave."""
    target = _parse(ActorTarget, argv, "drain")
    asyncio.run(_drain(target))
    print(f"the actor at {target.actor} drains")
    return 0


def top(argv: Sequence[str]) -> int:
    """Watch a run until it is finished, or until Ctrl-C."""
    asyncio.run(_watch(_parse(Target, argv, "top")))
    return 0


def to_plain(message: Message) -> dict[str, object]:
    """Every field under its name in the .proto; durations in seconds, enums by name, None for what is unset."""
    return {field.name: _plain_field(message, field) for field in message.DESCRIPTOR.fields}


def _plain_field(message: Message, field: Any) -> object:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_plain_value(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _plain_value(value, field)


def _plain_value(value: Any, field: Any) -> object:
    if isinstance(value, Duration):
        return to_seconds(value)
    if isinstance(value, Message):
        return to_plain(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def _parse(config_type: type[ConfigT], argv: Sequence[str], command: str) -> ConfigT:
    return tyro.cli(
        config_type,
        args=list(argv),
        prog=f"penstock {command}",
        description=globals()[command].__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


async def _ask(target: Target, question: Callable[[RunClient], Awaitable[AnswerT]]) -> AnswerT:
    async with target.connect() as run:
        return await question(run)


async def _print_events(target: EventsTarget) -> None:
    async with target.connect() as run:
        async for event in run.events(after=target.after, follow=target.follow):
            when = event.time.ToDatetime().strftime("%H:%M:%S")
            print(f"{event.sequence:>6}  {when}  {event.kind:<12}  {event.message}", flush=True)


async def _drain(target: ActorTarget) -> None:
    async with rpc.channel(target.actor) as channel:
        drain_actor: Callable[..., Awaitable[object]] = ActorServiceStub(channel).DrainActor
        try:
            await drain_actor(actor_pb2.DrainActorRequest(), timeout=target.timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise explain(error, _ACTOR, target.actor, target.timeout_seconds) from None


async def _watch(target: Target) -> None:
    stop = Stop()
    stop.on_signals()
    async with target.connect() as run:
        first, rewards = await run.status(), RewardHistory()
        if not sys.stdout.isatty():
            await _watch_lines(run, first, stop)
            return
        with Live(auto_refresh=False) as live:
            async for shown in _statuses(run, first, stop):
                rewards.add(shown)
                live.update(render(shown, rewards), refresh=True)


async def _watch_lines(run: RunClient, first: pb.GetStatusResponse, stop: Stop) -> None:
    printed = ""
    async for shown in _statuses(run, first, stop):
        if str(shown.version) != printed:
            printed = str(shown.version)
            print(line(shown), flush=True)


async def _statuses(
    run: RunClient, first: pb.GetStatusResponse, stop: Stop
) -> AsyncIterator[pb.GetStatusResponse]:
    """The run's state, every half second, until it is finished or `stop`.

    Raises PeerLost once the learner has not answered for 15 s.
    """
    yield first
    shown, answered_at = first, time.monotonic()
    while shown.state != pb.RUN_STATE_FINISHED and not await stop.sleep(_REFRESH_SECONDS):
        try:
            shown = await run.status()
        except PeerLost:
            if time.monotonic() - answered_at > _PATIENCE_SECONDS:
                raise
            continue
        answered_at = time.monotonic()
        yield shown
