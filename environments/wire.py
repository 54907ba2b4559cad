"""Between the messages of environment.proto and the values of environments.base.

Reading checks everything that a driver relies on, and raises ProtocolError: a reply
that is not whole must never be taken for an episode or a reward.
"""

from __future__ import annotations

import math

from environments.base import Description, Message, StepResult
from environments.digest import observation_digest
from penstock.codec import reward_from_wire, reward_to_wire
from penstock.errors import ConfigError, ProtocolError
from penstock.rpc import to_duration, to_seconds
from penstock.trajectory import RewardStatus
from penstock.v1 import environment_pb2 as pb

Messages = tuple[Message, ...]

MAX_OBSERVATION_BYTES = 8 * 1024 * 1024
_ROLES = ("system", "user", "tool", "assistant")


def description_to_wire(description: Description) -> pb.DescribeResponse:
    return pb.DescribeResponse(
        name=description.name,
        version=description.version,
        digest=description.digest,
        level=pb.ENVIRONMENT_LEVEL_STEPPED,
        splits=[pb.Split(name=name, num_tasks=size) for name, size in sorted(description.splits.items())],
        max_turns=description.max_turns,
        session_ttl=to_duration(description.session_ttl_seconds),
        max_sessions=description.max_sessions,
    )


def description_from_wire(message: pb.DescribeResponse) -> Description:
    if message.level != pb.ENVIRONMENT_LEVEL_STEPPED:
        raise ProtocolError(f"the environment's level is {message.level}; expected ENVIRONMENT_LEVEL_STEPPED")
    splits = {split.name: split.num_tasks for split in message.splits}
    if len(splits) != len(message.splits):
        raise ProtocolError(f"a split is named twice in {[split.name for split in message.splits]}")
    try:
        return Description(
            name=message.name,
            version=message.version,
            digest=message.digest,
            splits=splits,
            max_turns=message.max_turns,
            session_ttl_seconds=to_seconds(message.session_ttl),
            max_sessions=message.max_sessions,
        )
    except ConfigError as error:
        raise ProtocolError(str(error)) from error


def reset_to_wire(messages: Messages) -> pb.ResetResponse:
    return pb.ResetResponse(
        observation=_observation_to_wire(messages), observation_digest=observation_digest(messages)
    )


def reset_from_wire(message: pb.ResetResponse) -> tuple[Messages, str]:
    """The first observation and its digest."""
    messages = _observation_from_wire(message.observation)
    if not messages:
        raise ProtocolError("the first observation holds no messages; expected what the policy is to answer")
    expected = observation_digest(messages)
    if message.observation_digest != expected:
        raise ProtocolError(
            f"observation_digest is {message.observation_digest!r}, but that of these messages is {expected}"
        )
    return messages, expected


def result_to_wire(result: StepResult) -> pb.StepResponse:
    return pb.StepResponse(
        observation=_observation_to_wire(result.messages),
        done=result.done,
        reward=reward_to_wire(result.reward),
        metrics=dict(result.metrics),
    )


def result_from_wire(message: pb.StepResponse) -> StepResult:
    if not message.HasField("reward"):
        raise ProtocolError("a step's answer has no reward; expected one with a status")
    reward = reward_from_wire(message.reward)
    if reward.value is not None and not math.isfinite(reward.value):
        raise ProtocolError(f"a reward is {reward.value}; expected a finite number")
    if message.done == (reward.status is RewardStatus.NOT_YET):
        raise ProtocolError(
            f"a step has done {message.done} and a reward that is {reward.status}; "
            "the reward comes with the step that is done, and not before"
        )
    messages = _observation_from_wire(message.observation)
    if not message.done and not messages:
        raise ProtocolError(
            "a step that is not done holds no messages; expected what the policy is to answer"
        )
    if not all(math.isfinite(value) for value in message.metrics.values()):
        raise ProtocolError(f"metrics are {dict(message.metrics)}; expected finite numbers")
    return StepResult(done=message.done, messages=messages, reward=reward, metrics=dict(message.metrics))


def _observation_to_wire(messages: Messages) -> pb.Observation:
    return pb.Observation(
        messages=[pb.Message(role=message.role, content=message.content) for message in messages]
    )


def _observation_from_wire(observation: pb.Observation) -> Messages:
    if observation.ByteSize() > MAX_OBSERVATION_BYTES:
        raise ProtocolError(
            f"an observation of {observation.ByteSize()} bytes; expected at most {MAX_OBSERVATION_BYTES}"
        )
    for message in observation.messages:
        if message.role not in _ROLES:
            raise ProtocolError(f"a message's role is {message.role!r}; expected one of {', '.join(_ROLES)}")
    return tuple(Message(role=message.role, content=message.content) for message in observation.messages)
