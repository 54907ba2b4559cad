"""What a worker sends is read as data: garbage of every kind is a ProtocolError."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from environments import frames
from environments.base import Message, StepResult
from penstock.errors import ProtocolError
from penstock.trajectory import Reward, RewardStatus

RESULT = StepResult(
    done=True,
    messages=(Message(role="tool", content="é\n"),),
    reward=Reward.valid(0.5),
    metrics={"turns": 3.0},
)


def result_with(**fields: object) -> dict[str, Any]:
    return {**frames.result_to_json(RESULT), **fields}


async def test_a_result_crosses_unchanged() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(frames.encode({"ok": frames.result_to_json(RESULT)}))
    assert frames.result_from_json((await frames.read_frame(reader))["ok"]) == RESULT


def test_both_sides_read_the_same_frames() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(frames.encode({"call": "reset"}))
            assert frames.receive_frame(ours) == {"call": "reset"}
        assert frames.receive_frame(ours) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[1]",
        b"3",
        b"\xff",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"[" * 200_000,
        b'{"a":' + b"9" * 5000,
    ],
)
def test_a_frame_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.decode(body)


async def test_a_frame_that_claims_to_be_huge_is_refused_before_it_is_read() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(b"\xff\xff\xff\xff")
    with pytest.raises(ProtocolError, match="at most"):
        await frames.read_frame(reader)


@pytest.mark.parametrize(
    "result",
    [
        None,
        [],
        {},
        result_with(done=1),
        result_with(messages=None),
        result_with(messages=[["user"]]),
        result_with(messages=[["user", 3]]),
        result_with(messages=[["user", "\ud800"]]),
        result_with(metrics={"a": "b"}),
        result_with(metrics={"a": True}),
        result_with(reward=None),
        result_with(reward={"status": "great", "value": 1.0, "message": ""}),
        result_with(reward={"status": [], "value": 1.0, "message": ""}),
        result_with(reward={"status": "valid", "value": None, "message": ""}),
        result_with(reward={"status": "valid", "value": "1", "message": ""}),
        result_with(reward={"status": "valid", "value": True, "message": ""}),
        result_with(reward={"status": "valid", "value": 10**400, "message": ""}),
        result_with(reward={"status": "valid", "value": float("nan"), "message": ""}),
        result_with(reward={"status": "valid", "value": float("inf"), "message": ""}),
        result_with(reward={"status": "not_yet", "value": 0.0, "message": ""}),
    ],
)
def test_a_result_that_is_not_whole_is_refused(result: object) -> None:
    with pytest.raises(ProtocolError):
        frames.result_from_json(result)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"1", object()])
def test_a_worker_cannot_send_a_reward_that_is_no_finite_number(value: object) -> None:
    result = StepResult(done=True, reward=Reward(status=RewardStatus.VALID, value=value))  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError)):
        frames.encode(frames.result_to_json(result))


@pytest.mark.parametrize("result", [None, 1.0, (True, 1.0), {"done": True}])
def test_only_a_step_result_is_a_step_result(result: object) -> None:
    with pytest.raises(TypeError, match=r"expected an environments\.base\.StepResult"):
        frames.result_to_json(result)
