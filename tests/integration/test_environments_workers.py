"""Environments that crash, hang and lie: each is a fault of its session, and of nobody else's."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from environments.base import StepResult
from environments.client import EnvironmentClient
from environments.worker_process import OUTPUT_BYTES_A_MINUTE
from penstock import rpc
from penstock.codec import task_to_wire
from penstock.errors import ConfigError, EnvironmentFault, EnvironmentFull, FaultKind
from penstock.trajectory import Reward, Task
from penstock.v1 import environment_pb2 as pb
from penstock.v1 import trajectory_pb2
from penstock.v1.environment_pb2_grpc import EnvironmentServiceStub
from tests.integration.environment_servers import CHECKOUT, serving

STEPPED = "tests.integration.hostile_environments:Hostile"
SCORER = "tests.integration.hostile_environments:HostileScorer"
TASK = Task("hostile", "train", 0, 0)
SCORER_TASK = Task("hostile_scorer", "train", 0, 0)
LETTERS = "tests.integration.toy_environments:Letters"
LETTERS_TASK = Task("letters", "train", 0, 0)
RIGHT = StepResult(done=True, reward=Reward.valid(1.0))

MISDEEDS = ["die", "crash", "exit", "raise", "memory", "forge", "nan", "infinite", "text", "true", "bare"]
MISDEEDS += ["nothing", "no reward", "surrogate", "role", "huge"]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import from the current folder."""
    monkeypatch.chdir(CHECKOUT)


async def play(client: EnvironmentClient, task: Task, name: str, *actions: str) -> StepResult | None:
    result = None
    async with client.session(session_id=name, fence=1, task=task) as episode:
        for action in actions:
            result = await episode.step(action)
    return result


async def test_an_episode_of_several_turns_is_played() -> None:
    async with serving(STEPPED, workers=1) as address, EnvironmentClient(address) as client:
        assert (await client.describe()).max_sessions == 1
        assert await play(client, TASK, "a", "go on", "go on", "end") == RIGHT


async def test_every_misdeed_in_a_step_is_a_fault_and_other_sessions_go_on() -> None:
    async with (
        serving(STEPPED, workers=3, memory_mib=256) as address,
        EnvironmentClient(address) as client,
        client.session(session_id="bystander", fence=1, task=TASK) as bystander,
    ):
        for action in MISDEEDS:
            with pytest.raises(EnvironmentFault) as fault:
                await play(client, TASK, f"with {action}", "go on", action)
            assert fault.value.kind is FaultKind.INFRASTRUCTURE, action
            assert (await bystander.step("go on")).messages
        assert await bystander.step("end") == RIGHT


async def test_every_misdeed_of_a_scorer_is_a_fault_and_never_a_reward() -> None:
    async with serving(SCORER, workers=2, memory_mib=256) as address, EnvironmentClient(address) as client:
        for action in MISDEEDS:
            with pytest.raises(EnvironmentFault) as fault:
                await play(client, SCORER_TASK, f"with {action}", action)
            assert fault.value.kind is FaultKind.INFRASTRUCTURE, action
        assert await play(client, SCORER_TASK, "good", "end") == RIGHT


@pytest.mark.parametrize(("target", "task"), [(STEPPED, TASK), (SCORER, SCORER_TASK)])
async def test_a_broken_task_is_a_data_fault(target: str, task: Task) -> None:
    async with serving(target, workers=1) as address, EnvironmentClient(address) as client:
        with pytest.raises(EnvironmentFault, match="this task is broken") as fault:
            await play(client, task, "a", "data")
        assert fault.value.kind is FaultKind.DATA


@pytest.mark.parametrize("action", ["hang", "sleep"])
async def test_a_hanging_step_is_killed_at_the_callers_deadline(action: str) -> None:
    """There is one worker, so that the second episode shows that it was killed."""
    async with (
        serving(STEPPED, workers=1) as address,
        EnvironmentClient(address, step_timeout_seconds=2.0) as client,
    ):
        with pytest.raises(EnvironmentFault) as fault:
            await play(client, TASK, "a", action)
        assert fault.value.kind is FaultKind.INFRASTRUCTURE
        assert await play(client, TASK, "b", "end") == RIGHT


async def test_a_hanging_reset_is_killed_at_the_callers_deadline() -> None:
    async with serving(STEPPED, workers=1) as address:
        async with EnvironmentClient(address, reset_timeout_seconds=1.0) as client:
            with pytest.raises(EnvironmentFault):
                await play(client, Task("hostile", "train", 99, 0), "a", "end")
        async with EnvironmentClient(address) as client:
            assert await play(client, TASK, "b", "end") == RIGHT


async def test_a_scorer_out_of_time_is_a_status_without_a_value_and_a_fault_to_the_driver() -> None:
    async with serving(SCORER, workers=1, scorer_seconds=2.0) as address:
        async with rpc.channel(address) as channel:
            stub = EnvironmentServiceStub(channel)
            wire_task = task_to_wire(SCORER_TASK)
            await stub.Reset(pb.ResetRequest(session_id="a", fence=1, task=wire_task), timeout=30)
            answer = await stub.Step(pb.StepRequest(session_id="a", fence=1, action="hang"), timeout=30)
            assert answer.reward.status == trajectory_pb2.REWARD_STATUS_SCORER_TIMEOUT
            assert not answer.reward.HasField("value")
        async with EnvironmentClient(address) as client:
            with pytest.raises(EnvironmentFault, match="scorer_timeout") as fault:
                await play(client, SCORER_TASK, "b", "hang")
            assert fault.value.kind is FaultKind.DATA
            assert await play(client, SCORER_TASK, "c", "end") == RIGHT


async def test_a_scorer_cut_short_by_its_caller_may_be_asked_again_in_the_same_session() -> None:
    async with serving(SCORER, workers=1) as address, rpc.channel(address) as channel:
        stub = EnvironmentServiceStub(channel)
        await stub.Reset(pb.ResetRequest(session_id="a", fence=1, task=task_to_wire(SCORER_TASK)), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Step(pb.StepRequest(session_id="a", fence=1, action="hang"), timeout=1)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        answer = await _when_free(stub, pb.StepRequest(session_id="a", fence=1, action="end"))
        assert answer.reward.value == 1.0


async def _when_free(stub: EnvironmentServiceStub, request: pb.StepRequest) -> pb.StepResponse:
    """The first call still stands in the way until the server has killed it."""
    async with asyncio.timeout(30):
        while True:
            try:
                response: pb.StepResponse = await stub.Step(request, timeout=30)  # type: ignore[misc]
                return response
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
            await asyncio.sleep(0.05)


async def test_a_step_asked_for_twice_at_once_runs_once() -> None:
    async with serving(STEPPED, workers=1) as address, rpc.channel(address) as channel:
        stub = EnvironmentServiceStub(channel)
        await stub.Reset(pb.ResetRequest(session_id="a", fence=1, task=task_to_wire(TASK)), timeout=30)
        request = pb.StepRequest(session_id="a", fence=1, action="go on")
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(_step(stub, request)) for _ in range(8)]
        assert len({call.result().SerializeToString() for call in calls}) == 1
        request = pb.StepRequest(session_id="a", fence=1, step_index=1, action="end")
        assert (await stub.Step(request, timeout=30)).done


async def _step(stub: EnvironmentServiceStub, request: pb.StepRequest) -> pb.StepResponse:
    response: pb.StepResponse = await stub.Step(request, timeout=30)  # type: ignore[misc]
    return response


async def test_thousands_of_single_turn_sessions_are_open_at_once_over_two_workers() -> None:
    async with (
        serving(SCORER, workers=2) as address,
        EnvironmentClient(address) as client,
        AsyncExitStack() as stack,
    ):
        episodes = [
            await stack.enter_async_context(
                client.session(
                    session_id=f"s{index}", fence=1, task=Task("hostile_scorer", "train", index, 0)
                )
            )
            for index in range(2000)
        ]
        assert episodes[1999].messages[0].content == "task 1999"
        assert await episodes[0].step("end") == RIGHT
        assert await episodes[1999].step("end") == RIGHT


async def test_a_driver_waits_while_all_workers_are_taken() -> None:
    async with serving(STEPPED, workers=1) as address, EnvironmentClient(address) as client:
        async with (
            asyncio.TaskGroup() as group,
            client.session(session_id="first", fence=1, task=TASK) as first,
        ):
            second = group.create_task(play(client, TASK, "second", "end"))
            assert (await first.step("go on")).messages
            assert not second.done()
        assert second.result() == RIGHT


async def test_a_server_that_stays_full_is_at_no_fault() -> None:
    async with (
        serving(STEPPED, workers=1) as address,
        EnvironmentClient(address, reset_timeout_seconds=0.5) as client,
        client.session(session_id="first", fence=1, task=TASK),
    ):
        with pytest.raises(EnvironmentFull, match="1 sessions are open"):
            await play(client, TASK, "second", "end")


async def test_a_session_without_calls_expires_and_frees_its_worker() -> None:
    """The second session can begin only when the first one has expired."""
    async with (
        serving(STEPPED, workers=1, session_ttl_seconds=1.5) as address,
        EnvironmentClient(address) as client,
        client.session(session_id="first", fence=1, task=TASK) as first,
    ):
        assert await play(client, TASK, "second", "end") == RIGHT
        with pytest.raises(EnvironmentFault, match="FAILED_PRECONDITION"):
            await first.step("go on")


async def test_a_session_stays_open_while_its_policy_is_slow() -> None:
    """As the rollouts of an engine that has more of them than slots."""
    async with (
        serving(STEPPED, workers=1, session_ttl_seconds=1.5) as address,
        EnvironmentClient(address) as client,
    ):
        await client.describe()
        async with client.session(session_id="slow", fence=1, task=TASK) as episode:
            await asyncio.sleep(4.0)
            assert (await episode.step("go on")).messages
            await asyncio.sleep(2.5)
            assert await episode.step("end") == RIGHT


async def test_what_workers_print_is_logged_up_to_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(STEPPED, workers=1) as address, EnvironmentClient(address) as client:
        assert await play(client, TASK, "a", "flood") == RIGHT
    printed = [record.getMessage() for record in caplog.records if "printed: x" in record.getMessage()]
    assert printed
    # The test may see the turn of a minute, which gives another allowance.
    assert sum(map(len, printed)) < 3 * OUTPUT_BYTES_A_MINUTE


@pytest.mark.parametrize(
    ("source", "start_seconds", "error"),
    [
        ("import os; os._exit(3)", 60.0, EnvironmentFault),
        ("while True: pass", 1.0, EnvironmentFault),
        ("raise RuntimeError('no')", 60.0, ConfigError),
        ("import no_such_thing", 60.0, ConfigError),
        ("x = (", 60.0, ConfigError),
    ],
)
async def test_a_module_that_does_not_load_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, start_seconds: float, error: type[Exception]
) -> None:
    (tmp_path / "broken_game.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExceptionGroup) as group:
        async with serving("broken_game:Game", workers=2, start_seconds=start_seconds):
            pass
    assert group.group_contains(error)


async def test_long_answers_in_any_script_reach_their_scorer() -> None:
    async with serving(LETTERS, workers=1) as address, EnvironmentClient(address) as client:
        assert await play(client, LETTERS_TASK, "long", "中" * 1_390_000) is not None
        with pytest.raises(EnvironmentFault, match="an action of 4500000 bytes"):
            await play(client, LETTERS_TASK, "too long", "中" * 1_500_000)


async def test_an_answer_that_no_worker_can_be_handed_is_a_data_fault_and_the_server_goes_on() -> None:
    async with serving(LETTERS, workers=1) as address, EnvironmentClient(address) as client:
        with pytest.raises(EnvironmentFault, match="cannot be handed to a worker") as fault:
            await play(client, LETTERS_TASK, "control characters", "\x01" * 2_000_000)
        assert fault.value.kind is FaultKind.DATA
        assert await play(client, LETTERS_TASK, "good", "a") == RIGHT


async def test_bytes_that_are_no_message_end_their_stream_and_nothing_else() -> None:
    async with serving(LETTERS, workers=1) as address, EnvironmentClient(address) as client:
        async with rpc.channel(address) as channel:
            stream = channel.stream_stream("/penstock.v1.EnvironmentService/Play")()
            await stream.write(b"\xff\xff\xff garbage")
            async with asyncio.timeout(20):
                assert await stream.read() is grpc.aio.EOF
        assert await play(client, LETTERS_TASK, "good", "a") == RIGHT
