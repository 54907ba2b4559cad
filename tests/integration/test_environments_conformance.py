"""The conformance suite catches a server that breaks a rule, and passes one that keeps them all."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from environments import conformance, wire
from environments.base import Description, Message, StepResult
from penstock import rpc
from penstock.errors import ConfigError
from penstock.trajectory import Reward
from penstock.v1 import environment_pb2 as pb
from penstock.v1 import trajectory_pb2
from penstock.v1.environment_pb2_grpc import (
    EnvironmentServiceServicer,
    add_EnvironmentServiceServicer_to_server,
)
from tests.integration.environment_servers import command, run

SETTINGS = conformance.Settings(timeout_seconds=10.0)
DESCRIPTION = Description(name="tiny", version="1", digest="00", splits={"eval": 2, "train": 3}, max_turns=2)


@dataclass
class Session:
    fence: int
    task: trajectory_pb2.Task
    actions: list[str] = field(default_factory=list)


class TinyServer(EnvironmentServiceServicer):
    """A whole server in few lines, as somebody else might write it; `breaks` names what it does wrong."""

    def __init__(self, breaks: str = "") -> None:
        self.breaks = breaks
        self.sessions: dict[str, Session] = {}
        self.num_calls = 0

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        response = wire.description_to_wire(DESCRIPTION)
        self.num_calls += 1
        if self.breaks == "no digest":
            response.digest = ""
        if self.breaks == "changing description":
            response.digest = f"{self.num_calls:02x}"
        if self.breaks == "odd split":
            response.splits.add(name="train")
        if self.breaks == "no splits":
            del response.splits[:]
        return response

    async def Reset(self, request: pb.ResetRequest, context: Any) -> pb.ResetResponse:
        sizes = DESCRIPTION.splits
        beyond = request.task.index >= sizes.get(request.task.split, 99)
        if (beyond and self.breaks != "any index") or (
            request.task.split not in sizes and self.breaks != "any split"
        ):
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "no such task")
        session = await self._known(request, context)
        repeated = session is not None and session.fence == request.fence
        if session is not None and repeated and session.task != request.task and self.breaks != "other task":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "another task")
        if session is None or session.fence < request.fence or self.breaks == "reset anew":
            self.sessions[request.session_id] = Session(request.fence, request.task)
        return self._first()

    def _first(self) -> pb.ResetResponse:
        self.num_calls += 1
        content = f"number {self.num_calls}" if self.breaks in ("random", "reset anew") else "?"
        response = wire.reset_to_wire((Message(role="user", content=content),))
        if self.breaks == "own digest":
            response.observation_digest = "ff"
        if self.breaks == "no message":
            return pb.ResetResponse()
        return response

    async def Step(self, request: pb.StepRequest, context: Any) -> pb.StepResponse:
        session = await self._open(request, context)
        index, actions = request.step_index, session.actions
        if index == len(actions) or self.breaks == "any order":
            actions.append(request.action)
        elif index == len(actions) - 1 and request.action != actions[index] and self.breaks != "other action":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "another action")
        elif index == len(actions) - 1 and self.breaks == "step again":
            actions.append(request.action)
        elif index != len(actions) - 1:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "out of order")
        return self._result(len(actions) == 2)

    def _result(self, done: bool) -> pb.StepResponse:
        if done and self.breaks == "never done":
            done = False
        if done and self.breaks == "done without reward":
            return pb.StepResponse(done=True)
        if done:
            return wire.result_to_wire(StepResult(done=True, reward=Reward.valid(1.0)))
        if self.breaks == "early reward":
            return pb.StepResponse(
                reward=trajectory_pb2.Reward(status=trajectory_pb2.REWARD_STATUS_VALID, value=0.0)
            )
        return wire.result_to_wire(StepResult(done=False, messages=(Message(role="tool", content="more"),)))

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        if self.breaks == "no renewal":
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "what for?")
        await self._open(request, context)
        return pb.RenewResponse()

    async def Close(self, request: pb.CloseRequest, context: Any) -> pb.CloseResponse:
        session = await self._known(request, context)
        if session is None and self.breaks == "close once":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such session")
        self.sessions.pop(request.session_id, None)
        return pb.CloseResponse()

    async def _known(self, request: Any, context: Any) -> Session | None:
        session = self.sessions.get(request.session_id)
        if session is not None and request.fence < session.fence and self.breaks != "no fences":
            await context.abort(grpc.StatusCode.ABORTED, "a higher fence holds it")
        return session

    async def _open(self, request: Any, context: Any) -> Session:
        session = await self._known(request, context)
        if session is None and self.breaks == "reopens":
            session = self.sessions[request.session_id] = Session(request.fence, trajectory_pb2.Task())
        if session is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no such session")
        assert session is not None
        return session


@pytest.fixture
async def serving() -> AsyncIterator[Callable[[str], Any]]:
    stack = contextlib.AsyncExitStack()

    async def start(breaks: str) -> str:
        server = rpc.server()
        add_EnvironmentServiceServicer_to_server(TinyServer(breaks), server)
        port = rpc.bind(server, "127.0.0.1:0")
        await stack.enter_async_context(rpc.serving(server, grace_seconds=0))
        return f"127.0.0.1:{port}"

    async with stack:
        yield start


async def test_a_server_that_keeps_every_rule_passes(serving: Callable[[str], Any]) -> None:
    findings = await conformance.check(await serving(""), SETTINGS)
    assert [finding for finding in findings if not finding.passed] == []
    assert len(findings) == len(conformance.RULES)


BREAKS = {
    "no digest": "describes_itself",
    "changing description": "describes_itself",
    "odd split": "has_splits",
    "no splits": "has_splits",
    "no message": "first_observation_is_whole",
    "own digest": "first_observation_is_whole",
    "random": "equal_tasks_look_alike",
    "reset anew": "reset_is_idempotent",
    "other task": "reset_refuses_another_task",
    "step again": "steps_are_idempotent",
    "other action": "steps_refuse_another_action",
    "any order": "steps_come_in_order",
    "done without reward": "rewards_have_a_status",
    "early reward": "rewards_have_a_status",
    "never done": "rewards_have_a_status",
    "no fences": "a_higher_fence_replaces",
    "reopens": "lost_sessions_stay_lost",
    "no renewal": "sessions_can_be_renewed",
    "any index": "unknown_tasks_are_refused",
    "any split": "unknown_tasks_are_refused",
    "close once": "closing_twice_is_no_error",
}


@pytest.mark.parametrize(("breaks", "rule"), BREAKS.items())
async def test_a_broken_rule_is_found(serving: Callable[[str], Any], breaks: str, rule: str) -> None:
    findings = await conformance.check(await serving(breaks), SETTINGS)
    assert rule in {finding.rule for finding in findings if not finding.passed}


def test_every_rule_is_broken_once_above() -> None:
    unbroken = {rule.__name__ for rule in conformance.RULES} - set(BREAKS.values())
    # A step of the tiny server never outlasts its caller's patience.
    assert unbroken == {"a_hasty_caller_may_ask_again"}


async def test_a_split_that_the_server_lacks_is_a_clear_error(serving: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match="has no split 'test'"):
        await conformance.check(await serving(""), conformance.Settings(split="test"))


def test_the_command_prints_a_line_a_rule_and_fails_if_one_is_broken() -> None:
    target = "tests.integration.hostile_environments:Forgetful"
    with command(target, "--workers", "2") as (_, address):
        checked = run("check", address)
    assert checked.returncode == 1
    assert "FAIL  equal tasks look alike" in checked.stdout
    assert f"{len(conformance.RULES) - 1} of {len(conformance.RULES)} rules pass" in checked.stdout
