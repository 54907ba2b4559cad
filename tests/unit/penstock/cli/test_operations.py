"""The commands against a learner that answers from memory, over real gRPC on loopback."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from penstock import cli
from penstock.rpc import to_duration
from penstock.v1 import actor_pb2, actor_pb2_grpc, operator_pb2_grpc, trajectory_pb2
from penstock.v1 import operator_pb2 as pb


class FakeLearner(operator_pb2_grpc.OperatorServiceServicer):
    """Answers each status with the next in line, the last one for ever."""

    def __init__(self) -> None:
        self.address = ""
        self.calls: list[str] = []
        self.statuses = [
            pb.GetStatusResponse(
                run_id="r1",
                state=pb.RUN_STATE_RUNNING,
                version=trajectory_pb2.PolicyVersion(epoch=1, step=step),
                num_steps=2,
                ledger=pb.LedgerStatus(accepted=2**40, rejected={"BAD_ID": 3}),
                uptime=to_duration(1.5),
                actors=[pb.ActorStatus(actor_id="actor-1")],
            )
            for step in range(3)
        ]
        self.statuses[-1].state = pb.RUN_STATE_FINISHED

    def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def Why(self, request: Any, context: Any) -> pb.WhyResponse:
        return pb.WhyResponse(lines=["the learner waits for actor-1", "actor-1 is silent for 7 s"])

    def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> Iterator[pb.WatchEventsResponse]:
        for sequence in range(request.after + 1, 4):
            yield pb.WatchEventsResponse(sequence=sequence, kind="joined", message=f"actor-{sequence}")

    def Pause(self, request: Any, context: Any) -> pb.PauseResponse:
        self.calls.append("pause")
        return pb.PauseResponse()

    def Resume(self, request: Any, context: Any) -> pb.ResumeResponse:
        self.calls.append("resume")
        return pb.ResumeResponse()

    def Checkpoint(self, request: Any, context: Any) -> pb.CheckpointResponse:
        self.calls.append("checkpoint")
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no trainer is connected")


class FakeActor(actor_pb2_grpc.ActorServiceServicer):
    def __init__(self) -> None:
        self.drained = False

    def DrainActor(self, request: Any, context: Any) -> actor_pb2.DrainActorResponse:
        self.drained = True
        return actor_pb2.DrainActorResponse()


@pytest.fixture
def learner() -> Iterator[FakeLearner]:
    fake = FakeLearner()
    server = grpc.server(ThreadPoolExecutor(2))
    operator_pb2_grpc.add_OperatorServiceServicer_to_server(fake, server)
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield fake
    server.stop(None).wait()


def test_why_prints_the_learners_lines(learner: FakeLearner, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["why", "--learner", learner.address]) == 0

    assert capsys.readouterr().out == "the learner waits for actor-1\nactor-1 is silent for 7 s\n"


def test_status_is_drawn(learner: FakeLearner, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--learner", learner.address]) == 0

    assert "run r1 running" in capsys.readouterr().out


def test_status_as_json_has_every_field_of_the_proto_as_plain_values(
    learner: FakeLearner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--json", "--learner", learner.address]) == 0

    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {field.name for field in pb.GetStatusResponse.DESCRIPTOR.fields}
    assert answer["state"] == "RUN_STATE_RUNNING"
    assert answer["version"] == {"epoch": 1, "step": 0}
    assert answer["ledger"]["accepted"] == 2**40
    assert answer["ledger"]["imbalance"] == 0
    assert answer["ledger"]["rejected"] == {"BAD_ID": 3}
    assert answer["uptime"] == 1.5
    assert answer["actors"][0]["actor_id"] == "actor-1"
    assert answer["actors"][0]["installed"] is None
    assert answer["environments"] == []


def test_events_are_printed_after_a_number(learner: FakeLearner, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["events", "--after", "1", "--learner", learner.address]) == 0

    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["2", "00:00:00", "joined", "actor-2"],
        ["3", "00:00:00", "joined", "actor-3"],
    ]


def test_top_without_a_terminal_prints_a_line_a_version_until_the_run_is_finished(
    learner: FakeLearner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["top", "--learner", learner.address]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1.0", "1.1", "1.2"]


def test_pause_and_resume_reach_the_learner(learner: FakeLearner) -> None:
    assert cli.main(["pause", "--learner", learner.address]) == 0
    assert cli.main(["resume", "--learner", learner.address]) == 0

    assert learner.calls == ["pause", "resume"]


def test_a_refusal_is_told_with_its_reason(learner: FakeLearner, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "--learner", learner.address]) == 1

    assert "FAILED_PRECONDITION: no trainer is connected" in capsys.readouterr().err


def test_drain_reaches_an_actor(capsys: pytest.CaptureFixture[str]) -> None:
    actor, server = FakeActor(), grpc.server(ThreadPoolExecutor(1))
    actor_pb2_grpc.add_ActorServiceServicer_to_server(actor, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        assert cli.main(["drain", address]) == 0
    finally:
        server.stop(None).wait()

    assert actor.drained


def test_drain_of_a_learner_is_refused(learner: FakeLearner, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["drain", learner.address]) == 1

    assert f"{learner.address} answers, but is no actor" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "why", "events", "top", "pause", "resume", "checkpoint"])
def test_a_learner_that_is_not_there_is_one_line_and_status_1(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--learner", "127.0.0.1:1"]) == 1

    error = capsys.readouterr().err
    assert error.startswith("penstock: no learner answers at 127.0.0.1:1; start it with")
    assert error.count("\n") == 1


def test_an_address_that_is_none_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--learner", "nowhere"]) == 2

    assert "expected HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["events", "--after", "-1"], "after is -1; expected 0"),
        (["events", "--after", str(2**63)], "expected 0 (all) or the number of an event"),
        (["events", "--timeout-seconds", "0"], "timeout_seconds is 0.0; expected more than 0"),
        (["drain", "127.0.0.1:1", "--timeout-seconds", "0"], "timeout_seconds is 0.0; expected more than 0"),
    ],
)
def test_numbers_that_mean_nothing_are_status_2(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)

    assert ended.value.code == 2
    assert problem in " ".join(capsys.readouterr().err.split())
