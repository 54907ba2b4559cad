"""What the client makes of a server that fails, lies or is away: faults, with the right kind."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
import pytest

from environments import wire
from environments.base import Description, Message
from environments.calls import CallFailed, StreamedCalls
from environments.client import EnvironmentClient
from environments.streams import Calls, Handlers
from penstock import rpc
from penstock.errors import EnvironmentFault, FaultKind
from penstock.trajectory import Task
from penstock.v1 import environment_pb2 as pb
from penstock.v1 import trajectory_pb2
from penstock.v1.environment_pb2_grpc import (
    EnvironmentServiceServicer,
    add_EnvironmentServiceServicer_to_server,
)

TASK = Task("fake", "train", 0, 0)
FIRST = (Message(role="user", content="2+2="),)
Reward = trajectory_pb2.Reward
DONE = pb.StepResponse(done=True, reward=Reward(status=trajectory_pb2.REWARD_STATUS_VALID, value=1.0))


class FakeServer(EnvironmentServiceServicer):
    """Answers with what a test has put here: a message, or a status to fail with."""

    def __init__(self) -> None:
        self.description = wire.description_to_wire(
            Description(name="fake", version="1", digest="00", splits={"train": 1})
        )
        self.reset: Any = wire.reset_to_wire(FIRST)
        self.step: Any = DONE
        self.fault = ""
        self.failures = 0
        """Calls that fail with UNAVAILABLE before one is answered."""
        self.closed: list[str] = []
        self.steps: list[pb.StepRequest] = []

    async def _answer(self, answer: Any, context: Any) -> Any:
        if self.failures > 0:
            self.failures -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        if isinstance(answer, grpc.StatusCode):
            await context.abort(answer, "as told", (("penstock-fault", self.fault),) if self.fault else ())
        return answer

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        response: pb.DescribeResponse = await self._answer(self.description, context)
        return response

    async def Reset(self, request: pb.ResetRequest, context: Any) -> pb.ResetResponse:
        response: pb.ResetResponse = await self._answer(self.reset, context)
        return response

    async def Step(self, request: pb.StepRequest, context: Any) -> pb.StepResponse:
        self.steps.append(request)
        response: pb.StepResponse = await self._answer(self.step, context)
        return response

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        return pb.RenewResponse()

    async def Close(self, request: pb.CloseRequest, context: Any) -> pb.CloseResponse:
        self.closed.append(request.session_id)
        return pb.CloseResponse()


class StreamingServer(FakeServer):
    """Takes the same calls over a stream too."""

    def __init__(self) -> None:
        super().__init__()
        self.message_sizes: list[int] = []
        """Calls of each message."""
        self.breaks = 0
        """Streams that end at their first message."""
        self._tasks: set[asyncio.Task[None]] = set()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        return task

    async def _requests(self, requests: AsyncIterator[pb.PlayRequest]) -> AsyncIterator[pb.PlayRequest]:
        async for request in requests:
            self.message_sizes.append(len(request.calls))
            if self.breaks > 0:
                self.breaks -= 1
                return
            yield request

    async def Play(
        self, request_iterator: AsyncIterator[pb.PlayRequest], context: Any
    ) -> AsyncIterator[pb.PlayResponse]:
        handlers: Handlers = {
            "reset": self.Reset,
            "step": self.Step,
            "renew": self.Renew,
            "close": self.Close,
        }
        async for response in Calls(handlers, self._spawn).answers(self._requests(request_iterator)):
            yield response


@pytest.fixture(params=[FakeServer, StreamingServer], ids=["single calls", "a stream"])
async def fake(request: pytest.FixtureRequest) -> FakeServer:
    made: FakeServer = request.param()
    return made


@pytest.fixture
async def streaming() -> AsyncIterator[tuple[StreamingServer, EnvironmentClient]]:
    async with connected_to(StreamingServer()) as (server, client):
        assert isinstance(server, StreamingServer)
        yield server, client


@pytest.fixture
async def client(fake: FakeServer) -> AsyncIterator[EnvironmentClient]:
    async with connected_to(fake) as (_, connected):
        yield connected


@contextlib.asynccontextmanager
async def connected_to(fake: FakeServer) -> AsyncIterator[tuple[FakeServer, EnvironmentClient]]:
    server = rpc.server()
    add_EnvironmentServiceServicer_to_server(fake, server)
    port = rpc.bind(server, "127.0.0.1:0")
    async with (
        rpc.serving(server, grace_seconds=0),
        EnvironmentClient(f"127.0.0.1:{port}", reset_timeout_seconds=5.0, step_timeout_seconds=5.0) as client,
    ):
        yield fake, client


@contextlib.contextmanager
def a_fault(kind: FaultKind) -> Any:
    with pytest.raises(EnvironmentFault) as fault:
        yield
    assert fault.value.kind is kind


async def play(client: EnvironmentClient) -> None:
    async with client.session(session_id="a", fence=3, task=TASK) as episode:
        await episode.step("4")


async def closed(fake: FakeServer, *session_ids: str) -> None:
    """Sessions are closed, soon after they are left."""
    async with asyncio.timeout(10.0):
        while sorted(fake.closed) != sorted(session_ids):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_an_episode_is_opened_stepped_and_closed(client: EnvironmentClient, fake: FakeServer) -> None:
    async with client.session(session_id="a", fence=3, task=TASK) as episode:
        assert episode.messages == FIRST
        await episode.renew()
        assert (await episode.step("4")).reward.value == 1.0
    assert (fake.steps[0].fence, fake.steps[0].step_index, fake.steps[0].action) == (3, 0, "4")
    await closed(fake, "a")


Streaming = tuple[StreamingServer, EnvironmentClient]


async def test_sessions_that_are_played_at_once_share_messages(streaming: Streaming) -> None:
    server, client = streaming

    async def play_one(number: int) -> float | None:
        async with client.session(session_id=f"s{number}", fence=0, task=TASK) as episode:
            return (await episode.step(str(number))).reward.value

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        playing = [group.create_task(play_one(number)) for number in range(50)]
    assert [task.result() for task in playing] == [1.0] * 50
    await closed(server, *(f"s{number}" for number in range(50)))
    assert sum(server.message_sizes) == 150
    assert len(server.message_sizes) < 75
    assert {request.action for request in server.steps} == {str(number) for number in range(50)}


async def test_a_stream_that_broke_is_opened_again_and_its_calls_are_repeated(streaming: Streaming) -> None:
    server, client = streaming
    server.breaks = 2
    await play(client)
    await closed(server, "a")


class StreamBrokenInWrite:
    """What gRPC makes of a server that ends a stream while it is written to."""

    def __init__(self) -> None:
        self._broken = asyncio.Event()

    async def write(self, request: object) -> None:
        self._broken.set()
        await self.read()

    async def read(self) -> object:
        await self._broken.wait()
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, "Internal error from Core")

    def cancel(self) -> bool:
        return True


async def test_a_stream_that_broke_as_it_was_written_to_may_be_opened_again() -> None:
    calls = StreamedCalls(StreamBrokenInWrite)  # type: ignore[arg-type]
    with pytest.raises(CallFailed) as failed:
        await calls("reset", pb.ResetRequest(), 5.0)
    assert failed.value.code is grpc.StatusCode.UNAVAILABLE


async def test_an_answer_that_never_comes_is_a_fault_at_its_deadline(streaming: Streaming) -> None:
    server, client = streaming
    server.reset = asyncio.Event()

    async def never(request: pb.ResetRequest, context: Any) -> pb.ResetResponse:
        await server.reset.wait()
        raise AssertionError

    server.Reset = never  # type: ignore[method-assign]
    client.reset_timeout_seconds = 0.2
    with a_fault(FaultKind.INFRASTRUCTURE):
        await play(client)


async def test_steps_are_numbered(client: EnvironmentClient, fake: FakeServer) -> None:
    fake.step = pb.StepResponse(
        observation=pb.Observation(messages=[pb.Message(role="tool", content="go on")]),
        reward=Reward(status=trajectory_pb2.REWARD_STATUS_NOT_YET),
    )
    async with client.session(session_id="a", fence=0, task=TASK) as episode:
        await episode.step("x")
        await episode.step("y")
    assert [request.step_index for request in fake.steps] == [0, 1]


async def test_a_session_is_closed_whatever_happens_in_it(
    client: EnvironmentClient, fake: FakeServer
) -> None:
    with pytest.raises(RuntimeError):
        async with client.session(session_id="a", fence=0, task=TASK):
            raise RuntimeError("the engine failed")
    await closed(fake, "a")


async def test_a_client_that_leaves_at_once_has_closed_its_sessions(fake: FakeServer) -> None:
    async with connected_to(fake) as (_, client):
        await play(client)
        await client.close()
        assert fake.closed == ["a"]


async def test_a_server_that_is_away_for_a_moment_is_asked_again(
    client: EnvironmentClient, fake: FakeServer
) -> None:
    fake.failures = 2
    await play(client)


async def test_a_server_that_stays_away_is_an_infrastructure_fault(
    client: EnvironmentClient, fake: FakeServer
) -> None:
    fake.failures = 1000
    with a_fault(FaultKind.INFRASTRUCTURE):
        await play(client)
    assert 1000 - fake.failures == 4


async def test_nobody_listening_is_an_infrastructure_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    async with EnvironmentClient(address, reset_timeout_seconds=2.0) as client:
        with a_fault(FaultKind.INFRASTRUCTURE):
            await client.describe()


@pytest.mark.parametrize(
    ("code", "told", "kind"),
    [
        (grpc.StatusCode.INTERNAL, "", FaultKind.INFRASTRUCTURE),
        (grpc.StatusCode.INTERNAL, "data", FaultKind.DATA),
        (grpc.StatusCode.INTERNAL, "infrastructure", FaultKind.INFRASTRUCTURE),
        (grpc.StatusCode.INTERNAL, "whatever", FaultKind.INFRASTRUCTURE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", FaultKind.INFRASTRUCTURE),
        (grpc.StatusCode.FAILED_PRECONDITION, "", FaultKind.INFRASTRUCTURE),
        (grpc.StatusCode.ABORTED, "", FaultKind.INFRASTRUCTURE),
        (grpc.StatusCode.UNIMPLEMENTED, "", FaultKind.INFRASTRUCTURE),
        (grpc.StatusCode.OUT_OF_RANGE, "", FaultKind.DATA),
        (grpc.StatusCode.OUT_OF_RANGE, "infrastructure", FaultKind.INFRASTRUCTURE),
    ],
)
async def test_a_status_becomes_a_fault_of_its_kind(
    client: EnvironmentClient, fake: FakeServer, code: grpc.StatusCode, told: str, kind: FaultKind
) -> None:
    fake.reset, fake.fault = code, told
    with a_fault(kind):
        await play(client)
    fake.reset, fake.step = wire.reset_to_wire(FIRST), code
    with a_fault(kind):
        await play(client)


@pytest.mark.parametrize(
    "answer",
    [
        pb.StepResponse(),
        pb.StepResponse(done=True),
        pb.StepResponse(done=True, reward=Reward(value=1.0)),
        pb.StepResponse(done=True, reward=Reward(status=trajectory_pb2.REWARD_STATUS_VALID)),
        pb.StepResponse(done=True, reward=Reward(status=trajectory_pb2.REWARD_STATUS_VALID, value=math.nan)),
        pb.StepResponse(done=True, reward=Reward(status=trajectory_pb2.REWARD_STATUS_NOT_YET)),
        pb.StepResponse(done=True, reward=Reward(status=99, value=1.0)),  # type: ignore[arg-type]
        pb.StepResponse(done=True, reward=Reward(status=trajectory_pb2.REWARD_STATUS_INFRASTRUCTURE_ERROR)),
    ],
)
async def test_a_step_answered_with_garbage_is_a_fault_and_no_reward(
    client: EnvironmentClient, fake: FakeServer, answer: pb.StepResponse
) -> None:
    fake.step = answer
    with a_fault(FaultKind.INFRASTRUCTURE):
        await play(client)


async def test_a_scorer_out_of_time_is_a_data_fault(client: EnvironmentClient, fake: FakeServer) -> None:
    fake.step = pb.StepResponse(done=True, reward=Reward(status=trajectory_pb2.REWARD_STATUS_SCORER_TIMEOUT))
    with a_fault(FaultKind.DATA):
        await play(client)


async def test_an_observation_that_does_not_match_its_digest_is_a_fault(
    client: EnvironmentClient, fake: FakeServer
) -> None:
    fake.reset.observation.messages[0].content += "!"
    with a_fault(FaultKind.INFRASTRUCTURE):
        await play(client)
    await closed(fake, "a")


async def test_a_reply_beyond_grpcs_limit_is_a_fault(client: EnvironmentClient, fake: FakeServer) -> None:
    content = "x" * (rpc.MAX_MESSAGE_BYTES - 1_000)
    fake.reset = wire.reset_to_wire((Message(role="user", content=content),))
    with a_fault(FaultKind.INFRASTRUCTURE):
        await play(client)


async def test_a_description_that_is_not_whole_is_a_fault(
    client: EnvironmentClient, fake: FakeServer
) -> None:
    fake.description = pb.DescribeResponse()
    with a_fault(FaultKind.INFRASTRUCTURE):
        await client.describe()


def test_the_client_imports_no_library_that_environments_use() -> None:
    heavy = "{'torch', 'reasoning_gym', 'math_verify', 'sympy', 'transformers'}"
    code = f"import sys, environments.client; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
