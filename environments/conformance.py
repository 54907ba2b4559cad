"""What every server of EnvironmentService must do, as a suite that anybody can run.

Each rule is a function that plays against a live server, and raises RuleBroken. The
rules are independent of each other, and speak the bare protocol, not our client.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from environments import wire
from environments.base import StepResult
from penstock import rpc
from penstock.errors import ConfigError, ProtocolError
from penstock.v1 import environment_pb2 as pb
from penstock.v1 import trajectory_pb2
from penstock.v1.environment_pb2_grpc import EnvironmentServiceStub

_MAX_TURNS = 64
_FENCE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    split: str = ""
    """Split whose tasks are played; empty for the first one."""
    action: str = "0"
    """What the suite answers in every turn."""
    timeout_seconds: float = 30.0
    """Deadline of each call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    rule: str
    passed: bool
    message: str = ""


class RuleBroken(Exception):
    """The server does something else than the rule says."""


class Driver:
    """Bare calls on one server."""

    def __init__(self, stub: Any, settings: Settings, description: pb.DescribeResponse) -> None:
        self.stub = stub
        self.settings = settings
        self.description = description

    def task(self, index: int = 0, *, split: str = "", seed: int = 7) -> trajectory_pb2.Task:
        name = split or self.settings.split or self.description.splits[0].name
        return trajectory_pb2.Task(environment=self.description.name, split=name, index=index, seed=seed)

    async def reset(
        self, session_id: str, task: trajectory_pb2.Task | None = None, *, fence: int = _FENCE
    ) -> pb.ResetResponse:
        request = pb.ResetRequest(session_id=session_id, fence=fence, task=task or self.task())
        response: pb.ResetResponse = await self.call(self.stub.Reset, request)
        return response

    async def step(
        self, session_id: str, index: int, *, action: str | None = None, fence: int = _FENCE
    ) -> pb.StepResponse:
        request = pb.StepRequest(
            session_id=session_id,
            fence=fence,
            step_index=index,
            action=self.settings.action if action is None else action,
        )
        response: pb.StepResponse = await self.call(self.stub.Step, request)
        return response

    async def renew(self, session_id: str, *, fence: int = _FENCE) -> None:
        await self.call(self.stub.Renew, pb.RenewRequest(session_id=session_id, fence=fence))

    async def close(self, session_id: str, *, fence: int = _FENCE) -> None:
        await self.call(self.stub.Close, pb.CloseRequest(session_id=session_id, fence=fence))

    async def call(self, method: Any, request: object) -> Any:
        return await method(request, timeout=self.settings.timeout_seconds)


async def describes_itself(driver: Driver) -> None:
    """Describe gives a name, a version, a hexadecimal digest, a level, a time-to-live, twice the same."""
    _read(wire.description_from_wire, driver.description)
    again = await driver.call(driver.stub.Describe, pb.DescribeRequest())
    _expect(again == driver.description, "a second Describe differs from the first")


async def has_splits(driver: Driver) -> None:
    """Splits are named "train" or "eval", each once, and there is at least one."""
    names = [split.name for split in driver.description.splits]
    known = set(names) <= {"train", "eval"} and len(set(names)) == len(names)
    _expect(known and bool(names), f"the splits are {names}")


async def first_observation_is_whole(driver: Driver) -> None:
    """Reset gives messages with known roles, and their digest as environments/digest.py defines it."""
    session_id = _new_id()
    _read(wire.reset_from_wire, await driver.reset(session_id))
    await driver.close(session_id)


async def equal_tasks_look_alike(driver: Driver) -> None:
    """Two sessions on one task and seed begin with equal observations and digests."""
    ids = [_new_id(), _new_id()]
    first = await driver.reset(ids[0])
    await driver.close(ids[0])
    second = await driver.reset(ids[1])
    await driver.close(ids[1])
    _expect(first == second, "the first observations of one task and seed differ")


async def reset_is_idempotent(driver: Driver) -> None:
    """A repeated Reset (same fence, same task) gets the same answer, and a step goes on from it."""
    session_id = _new_id()
    first = await driver.reset(session_id)
    _expect(await driver.reset(session_id) == first, "the repeated Reset got another answer")
    await driver.step(session_id, 0)
    await driver.close(session_id)


async def reset_refuses_another_task(driver: Driver) -> None:
    """A Reset under the same fence but with another seed is INVALID_ARGUMENT."""
    session_id = _new_id()
    await driver.reset(session_id)
    other = driver.task(seed=8)
    await _expect_code(driver.reset(session_id, other), grpc.StatusCode.INVALID_ARGUMENT)
    await driver.close(session_id)


async def steps_are_idempotent(driver: Driver) -> None:
    """The same action at the last index gets the same answer."""
    session_id = _new_id()
    await driver.reset(session_id)
    first = await driver.step(session_id, 0)
    _expect(await driver.step(session_id, 0) == first, "the repeated step got another answer")
    await driver.close(session_id)


async def steps_refuse_another_action(driver: Driver) -> None:
    """Another action at the last index is INVALID_ARGUMENT."""
    session_id = _new_id()
    await driver.reset(session_id)
    await driver.step(session_id, 0)
    another = driver.step(session_id, 0, action=driver.settings.action + " or not")
    await _expect_code(another, grpc.StatusCode.INVALID_ARGUMENT)
    await driver.close(session_id)


async def steps_come_in_order(driver: Driver) -> None:
    """An index that is not the next is INVALID_ARGUMENT."""
    session_id = _new_id()
    await driver.reset(session_id)
    await _expect_code(driver.step(session_id, 3), grpc.StatusCode.INVALID_ARGUMENT)
    await driver.close(session_id)


async def rewards_have_a_status(driver: Driver) -> None:
    """NOT_YET before the step that is done; with it another status, and a finite value exactly if VALID."""
    session_id = _new_id()
    await driver.reset(session_id)
    result: StepResult | None = None
    for index in range(driver.description.max_turns or _MAX_TURNS):
        result = _read(wire.result_from_wire, await driver.step(session_id, index))
        if result.done:
            break
    await driver.close(session_id)
    ended = driver.description.max_turns == 0 or (result is not None and result.done)
    _expect(ended, f"the episode is not done after max_turns = {driver.description.max_turns}")


async def a_higher_fence_replaces(driver: Driver) -> None:
    """A Reset under a higher fence begins anew; the lower fence is ABORTED in Reset, Step, Renew and Close."""
    session_id = _new_id()
    await driver.reset(session_id)
    await driver.reset(session_id, fence=_FENCE + 1)
    calls = (driver.reset, lambda name: driver.step(name, 0), driver.renew, driver.close)
    for call in calls:
        await _expect_code(call(session_id), grpc.StatusCode.ABORTED)
    await driver.step(session_id, 0, fence=_FENCE + 1)
    await driver.close(session_id, fence=_FENCE + 1)


async def lost_sessions_stay_lost(driver: Driver) -> None:
    """Step and Renew on a session that was closed, or never was, are FAILED_PRECONDITION."""
    closed = _new_id()
    await driver.reset(closed)
    await driver.close(closed)
    for session_id in (closed, _new_id()):
        await _expect_code(driver.step(session_id, 0), grpc.StatusCode.FAILED_PRECONDITION)
        await _expect_code(driver.renew(session_id), grpc.StatusCode.FAILED_PRECONDITION)


async def sessions_can_be_renewed(driver: Driver) -> None:
    """Renew succeeds on an open session."""
    session_id = _new_id()
    await driver.reset(session_id)
    await driver.renew(session_id)
    await driver.close(session_id)


async def unknown_tasks_are_refused(driver: Driver) -> None:
    """An index past a bounded split, and an unknown split, are OUT_OF_RANGE."""
    await _expect_code(
        driver.reset(_new_id(), driver.task(split="no-such-split")), grpc.StatusCode.OUT_OF_RANGE
    )
    for split in driver.description.splits:
        if split.num_tasks:
            beyond = driver.task(split.num_tasks, split=split.name)
            await _expect_code(driver.reset(_new_id(), beyond), grpc.StatusCode.OUT_OF_RANGE)


async def closing_twice_is_no_error(driver: Driver) -> None:
    """Close succeeds on a session that is closed, and on one that never was."""
    session_id = _new_id()
    await driver.reset(session_id)
    await driver.close(session_id)
    await driver.close(session_id)
    await driver.close(_new_id())


async def a_hasty_caller_may_ask_again(driver: Driver) -> None:
    """After a step whose caller gave up at once, the same step is answered, or the session is plainly lost."""
    session_id = _new_id()
    await driver.reset(session_id)
    request = pb.StepRequest(session_id=session_id, fence=_FENCE, step_index=0, action=driver.settings.action)
    try:
        await driver.stub.Step(request, timeout=0.002)
    except grpc.aio.AioRpcError as error:
        _expect(
            error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, f"a 2 ms deadline ended in {error.code().name}"
        )
    try:
        _read(wire.result_from_wire, await driver.step(session_id, 0))
    except grpc.aio.AioRpcError as error:
        _expect(error.code() is grpc.StatusCode.FAILED_PRECONDITION, f"the step ended in {error.code().name}")
    await driver.close(session_id)


RULES: tuple[Callable[[Driver], Awaitable[None]], ...] = (
    describes_itself,
    has_splits,
    first_observation_is_whole,
    equal_tasks_look_alike,
    reset_is_idempotent,
    reset_refuses_another_task,
    steps_are_idempotent,
    steps_refuse_another_action,
    steps_come_in_order,
    rewards_have_a_status,
    a_higher_fence_replaces,
    lost_sessions_stay_lost,
    sessions_can_be_renewed,
    unknown_tasks_are_refused,
    closing_twice_is_no_error,
    a_hasty_caller_may_ask_again,
)


async def check(address: str, settings: Settings) -> list[Finding]:
    """Runs every rule. Raises ConfigError if the server cannot be reached or the settings don't fit it."""
    async with rpc.channel(address) as channel:
        stub = EnvironmentServiceStub(channel)
        try:
            description = await stub.Describe(
                pb.DescribeRequest(), timeout=settings.timeout_seconds, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            raise ConfigError(
                f"{address} does not answer Describe: {error.code().name}: {error.details()}"
            ) from None
        if settings.split and settings.split not in {split.name for split in description.splits}:
            raise ConfigError(f"{address} has no split {settings.split!r}")
        if not description.splits:
            return [Finding(rule=has_splits.__name__, passed=False, message="there are no splits")]
        driver = Driver(stub, settings, description)
        return [await _find(rule, driver) for rule in RULES]


def table(findings: list[Finding]) -> str:
    """One line a rule, and a count."""
    width = max(len(finding.rule) for finding in findings)
    lines = [
        f"{'pass' if finding.passed else 'FAIL'}  {finding.rule.replace('_', ' '):<{width}}  {finding.message}".rstrip()
        for finding in findings
    ]
    num_passed = sum(finding.passed for finding in findings)
    return "\n".join([*lines, f"{num_passed} of {len(findings)} rules pass"])


async def _find(rule: Callable[[Driver], Awaitable[None]], driver: Driver) -> Finding:
    try:
        await rule(driver)
    except RuleBroken as error:
        return Finding(rule=rule.__name__, passed=False, message=str(error))
    except grpc.aio.AioRpcError as error:
        message = f"a call failed with {error.code().name}: {error.details()}"
        return Finding(rule=rule.__name__, passed=False, message=message)
    return Finding(rule=rule.__name__, passed=True)


def _new_id() -> str:
    return f"check-{uuid.uuid4().hex}"


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise RuleBroken(message)


async def _expect_code(call: Awaitable[object], code: grpc.StatusCode) -> None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        _expect(error.code() is code, f"expected {code.name}, got {error.code().name}: {error.details()}")
    else:
        raise RuleBroken(f"expected {code.name}, got an answer")


def _read(read: Callable[[Any], Any], message: object) -> Any:
    try:
        return read(message)
    except ProtocolError as error:
        raise RuleBroken(str(error)) from error
