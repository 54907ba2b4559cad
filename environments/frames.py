"""What server and worker process say to each other: JSON objects, each after its length.

A worker runs code that nobody vouches for, so what it sends is read as data and checked
field by field. A frame is an unsigned 32-bit little-endian length, then that many bytes
of UTF-8 JSON, without NaN and infinities.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import Mapping
from typing import Any

from environments.base import Description, Message, StepResult
from penstock.errors import ProtocolError
from penstock.trajectory import Reward, RewardStatus, Task

MAX_FRAME_BYTES = 8 * 1024 * 1024
_LENGTH_BYTES = 4

Json = dict[str, Any]


def encode(message: Mapping[str, object]) -> bytes:
    """Raises ValueError or TypeError for what is not JSON, and for what is too large."""
    body = json.dumps(message, allow_nan=False, ensure_ascii=False).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes; expected at most {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def decode(body: bytes) -> Json:
    """Raises ProtocolError for anything but one JSON object."""
    try:
        message = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame that is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"a frame that holds a {type(message).__name__}; expected an object")
    return message


async def read_frame(reader: asyncio.StreamReader) -> Json:
    """Raises ProtocolError, asyncio.IncompleteReadError at the end of the stream."""
    length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
    return decode(await reader.readexactly(_checked(length)))


def receive_frame(channel: socket.socket) -> Json | None:
    """The worker's side. None when the server has gone."""
    header = _receive(channel, _LENGTH_BYTES)
    body = None if header is None else _receive(channel, _checked(int.from_bytes(header, "little")))
    return None if body is None else decode(body)


def _receive(channel: socket.socket, num_bytes: int) -> bytes | None:
    received = bytearray()
    while len(received) < num_bytes:
        chunk = channel.recv(min(num_bytes - len(received), 1 << 20))
        if not chunk:
            return None
        received += chunk
    return bytes(received)


def _checked(length: int) -> int:
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes; expected at most {MAX_FRAME_BYTES}")
    return length


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def task_to_json(task: Task) -> Json:
    return {"environment": task.environment, "split": task.split, "index": task.index, "seed": task.seed}


def task_from_json(value: Json) -> Task:
    return Task(**value)


def description_to_json(description: Description) -> Json:
    return {
        "name": description.name,
        "version": description.version,
        "digest": description.digest,
        "splits": dict(description.splits),
        "max_turns": description.max_turns,
        "session_ttl_seconds": description.session_ttl_seconds,
        "max_sessions": description.max_sessions,
    }


def description_from_json(value: object) -> Description:
    fields = _expect(dict, value, "a description")
    return Description(
        name=_text(fields.get("name")),
        version=_text(fields.get("version")),
        digest=_text(fields.get("digest")),
        splits={
            _text(name): _expect(int, size, "a split's size")
            for name, size in _expect(dict, fields.get("splits"), "splits").items()
        },
        max_turns=_expect(int, fields.get("max_turns"), "max_turns"),
        session_ttl_seconds=_number(fields.get("session_ttl_seconds"), "session_ttl_seconds"),
        max_sessions=_expect(int, fields.get("max_sessions"), "max_sessions"),
    )


def messages_to_json(messages: object) -> list[list[str]]:
    """Raises TypeError unless `messages` is a list or tuple of Message."""
    if not isinstance(messages, tuple | list) or not all(isinstance(item, Message) for item in messages):
        raise TypeError(f"messages are {_brief(messages)}; expected a tuple of environments.base.Message")
    return [[item.role, item.content] for item in messages]


def messages_from_json(value: object) -> tuple[Message, ...]:
    pairs = _expect(list, value, "messages")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ProtocolError(f"a message is {_brief(pair)}; expected a role and a content")
    return tuple(Message(role=_text(role), content=_text(content)) for role, content in pairs)


def result_to_json(result: object) -> Json:
    """Raises TypeError unless `result` is a StepResult whose reward is a Reward."""
    if not isinstance(result, StepResult) or not isinstance(result.reward, Reward):
        raise TypeError(
            f"a step gave {_brief(result)}; expected an environments.base.StepResult with a Reward"
        )
    reward = result.reward
    return {
        "done": result.done,
        "messages": messages_to_json(result.messages),
        "reward": {"status": reward.status, "value": reward.value, "message": reward.message},
        "metrics": dict(result.metrics),
    }


def result_from_json(value: object) -> StepResult:
    """Raises ProtocolError for whatever is not a whole, finite result."""
    fields = _expect(dict, value, "a step's result")
    metrics = _expect(dict, fields.get("metrics"), "metrics")
    return StepResult(
        done=_expect(bool, fields.get("done"), "done"),
        messages=messages_from_json(fields.get("messages")),
        reward=_reward_from_json(_expect(dict, fields.get("reward"), "a reward")),
        metrics={_text(name): _number(number, f"the metric {name!r}") for name, number in metrics.items()},
    )


def _reward_from_json(fields: Json) -> Reward:
    status = _text(fields.get("status"))
    if status not in set(RewardStatus):
        raise ProtocolError(
            f"a reward's status is {_brief(status)}; expected one of {[str(s) for s in RewardStatus]}"
        )
    value = fields.get("value")
    if (status == RewardStatus.VALID) != (value is not None):
        raise ProtocolError(
            f"a reward is {status} with the value {_brief(value)}; only valid has one, and always"
        )
    return Reward(
        status=RewardStatus(status),
        value=None if value is None else _number(value, "a reward"),
        message=_text(fields.get("message")),
    )


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProtocolError(f"{what} is {_brief(value)}; expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ProtocolError(f"{what} is {_brief(value)}; expected a finite number")
    return number


def _text(value: object) -> str:
    text: str = _expect(str, value, "a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ProtocolError(f"a text holds a lone surrogate, which is not Unicode: {error.reason}") from error
    return text


def _expect(kind: type, value: object, what: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProtocolError(f"{what} is {_brief(value)}; expected {kind.__name__}")
    return value


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def fault_of(reply: Json) -> tuple[str, str] | None:
    """Kind and message of the fault that a reply reports; None if it reports none."""
    fault = reply.get("fault")
    if fault is None:
        return None
    fields = _expect(dict, fault, "a fault")
    return _text(fields.get("kind")), _text(fields.get("message"))
