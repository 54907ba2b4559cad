"""What a driver accepts of a server's answers."""

from __future__ import annotations

import math

import pytest

from environments import wire
from environments.base import Description, Message, StepResult
from penstock.errors import ProtocolError
from penstock.trajectory import Reward, RewardStatus
from penstock.v1 import environment_pb2 as pb
from penstock.v1 import trajectory_pb2

DESCRIPTION = Description(
    name="game",
    version="1",
    digest="0f",
    splits={"train": 10, "eval": 0},
    max_turns=3,
    session_ttl_seconds=1.5,
    max_sessions=4,
)
VALID = trajectory_pb2.REWARD_STATUS_VALID
NOT_YET = trajectory_pb2.REWARD_STATUS_NOT_YET
ASKED = pb.Observation(messages=[pb.Message(role="user", content="?")])


def test_values_cross_unchanged() -> None:
    assert wire.description_from_wire(wire.description_to_wire(DESCRIPTION)) == DESCRIPTION
    messages = (Message(role="system", content=""), Message(role="user", content="2+2"))
    assert wire.reset_from_wire(wire.reset_to_wire(messages))[0] == messages
    result = StepResult(done=True, reward=Reward.valid(-1.0), metrics={"a": 0.5})
    assert wire.result_from_wire(wire.result_to_wire(result)) == result


@pytest.mark.parametrize(
    "broken",
    [
        {"name": ""},
        {"digest": "XY"},
        {"digest": ""},
        {"level": pb.ENVIRONMENT_LEVEL_UNSPECIFIED},
        {"splits": []},
        {"splits": [pb.Split(name="test")]},
        {"splits": [pb.Split(name="train"), pb.Split(name="train")]},
        {"session_ttl": None},
    ],
)
def test_a_description_that_is_not_whole_is_refused(broken: dict[str, object]) -> None:
    message = wire.description_to_wire(DESCRIPTION)
    for field, value in broken.items():
        message.ClearField(field)  # type: ignore[arg-type]
        message.MergeFrom(pb.DescribeResponse(**{field: value}))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError):
        wire.description_from_wire(message)


@pytest.mark.parametrize(
    "response",
    [
        pb.ResetResponse(),
        pb.ResetResponse(observation=ASKED),
        pb.ResetResponse(observation=ASKED, observation_digest="00"),
        pb.ResetResponse(observation=pb.Observation(messages=[pb.Message(role="oracle", content="?")])),
    ],
)
def test_a_first_observation_that_is_not_whole_is_refused(response: pb.ResetResponse) -> None:
    with pytest.raises(ProtocolError):
        wire.reset_from_wire(response)


@pytest.mark.parametrize(
    "response",
    [
        pb.StepResponse(),
        pb.StepResponse(done=True),
        pb.StepResponse(done=True, reward=trajectory_pb2.Reward(value=1.0)),
        pb.StepResponse(done=True, reward=trajectory_pb2.Reward(status=VALID)),
        pb.StepResponse(done=True, reward=trajectory_pb2.Reward(status=VALID, value=math.nan)),
        pb.StepResponse(done=True, reward=trajectory_pb2.Reward(status=VALID, value=math.inf)),
        pb.StepResponse(done=True, reward=trajectory_pb2.Reward(status=NOT_YET)),
        pb.StepResponse(observation=ASKED, reward=trajectory_pb2.Reward(status=VALID, value=1.0)),
        pb.StepResponse(reward=trajectory_pb2.Reward(status=NOT_YET)),
        pb.StepResponse(
            observation=ASKED, reward=trajectory_pb2.Reward(status=NOT_YET), metrics={"a": math.nan}
        ),
        pb.StepResponse(observation=ASKED, reward=trajectory_pb2.Reward(status=NOT_YET, value=0.0)),
    ],
)
def test_a_step_that_is_not_whole_is_refused(response: pb.StepResponse) -> None:
    with pytest.raises(ProtocolError):
        wire.result_from_wire(response)


def test_an_observation_beyond_the_limit_is_refused() -> None:
    huge = (Message(role="user", content="x" * (wire.MAX_OBSERVATION_BYTES + 1)),)
    with pytest.raises(ProtocolError, match="at most"):
        wire.reset_from_wire(wire.reset_to_wire(huge))


def test_an_answer_that_nobody_can_judge_is_a_result_without_a_value() -> None:
    result = StepResult(done=True, reward=Reward(status=RewardStatus.UNSCORABLE, message="ambiguous"))
    assert wire.result_from_wire(wire.result_to_wire(result)) == result
