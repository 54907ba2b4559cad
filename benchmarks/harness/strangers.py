"""Strangers who press upon a coordinator: calls that are refused, and connections that never say a whole word.

HTTP/2 by hand: a client of gRPC's own needs as much processor time for a call as the server
does, and could not offer ten thousand a second beside it on two cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import uvloop

from penstock.v1 import coordinator_pb2 as pb

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_END_STREAM, _END_HEADERS, _ACK = 0x1, 0x4, 0x1
_FRAME_HEADER_BYTES = 9
_CALLING_CONNECTIONS = 10
_TICK_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Pressed:
    """What the strangers have done in all."""

    seconds: float
    num_offered: int
    num_answered: int
    """Calls that the server refused in so many words."""
    num_reset: int
    """Calls that it dropped unread."""


@contextlib.contextmanager
def strangers(address: str, *, num_silent: int, calls_per_second: int) -> Iterator[list[Pressed]]:
    """Presses from a process of its own; the list holds what was done, once that is over."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.Process(target=_press, args=(theirs, address, num_silent, calls_per_second))
    child.start()
    pressed: list[Pressed] = []
    try:
        ours.recv()
        yield pressed
    finally:
        ours.send("stop")
        pressed.append(ours.recv())
        child.join(timeout=60)


def _press(pipe: Connection, address: str, num_silent: int, calls_per_second: int) -> None:
    uvloop.run(_press_until_told(pipe, address, num_silent, calls_per_second))


async def _press_until_told(pipe: Connection, address: str, num_silent: int, calls_per_second: int) -> None:
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as silent:
        for number in range(num_silent):
            half_said = silent.enter_context(socket.create_connection((host, int(port)), timeout=30))
            half_said.sendall(_PREFACE[: 14 + number % 8])
        callers = [_Caller(host, int(port)) for _ in range(_CALLING_CONNECTIONS)]
        tasks = [
            asyncio.create_task(caller.run(calls_per_second / _CALLING_CONNECTIONS)) for caller in callers
        ]
        pipe.send("pressing")
        began = time.perf_counter()
        await asyncio.to_thread(pipe.recv)
        seconds = time.perf_counter() - began
        for task in tasks:
            task.cancel()
    pipe.send(
        Pressed(
            seconds,
            sum(caller.num_offered for caller in callers),
            sum(caller.num_answered for caller in callers),
            sum(caller.num_reset for caller in callers),
        )
    )


class _Caller:
    """Offers Joins of another protocol at a steady rate on one connection, and waits for no answer."""

    def __init__(self, host: str, port: int) -> None:
        self.num_offered = self.num_answered = self.num_reset = 0
        self._host, self._port = host, port
        message = pb.JoinRequest(actor_id="stranger", protocol=999, num_slots=1).SerializeToString()
        self._body = b"\0" + len(message).to_bytes(4, "big") + message
        self._headers = _request_headers("/penstock.v1.CoordinatorService/Join", host)

    async def run(self, calls_per_second: float) -> None:
        """Until cancelled; connects anew when it is thrown out."""
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                writer.write(_PREFACE + _frame(_SETTINGS, 0, 0))
                try:
                    async with asyncio.TaskGroup() as both:
                        both.create_task(self._call(writer, calls_per_second))
                        await self._read(reader, writer)
                except* OSError:
                    pass
                finally:
                    writer.close()

    async def _call(self, writer: asyncio.StreamWriter, calls_per_second: float) -> None:
        began, num_sent = time.perf_counter(), 0
        while True:
            due = int((time.perf_counter() - began) * calls_per_second) - num_sent
            for _ in range(due):
                stream = 2 * num_sent + 1
                num_sent += 1
                writer.write(_frame(_HEADERS, _END_HEADERS, stream, self._headers))
                writer.write(_frame(_DATA, _END_STREAM, stream, self._body))
            self.num_offered += due
            await writer.drain()
            await asyncio.sleep(_TICK_SECONDS)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Counts answers; raises ConnectionResetError when the server has had enough."""
        while True:
            header = await reader.readexactly(_FRAME_HEADER_BYTES)
            contents = await reader.readexactly(int.from_bytes(header[:3], "big"))
            kind, flags = header[3], header[4]
            if kind == _HEADERS and flags & _END_STREAM:
                self.num_answered += 1
            elif kind == _RST_STREAM:
                self.num_reset += 1
            elif kind in (_SETTINGS, _PING) and not flags & _ACK:
                writer.write(_frame(kind, _ACK, 0, contents if kind == _PING else b""))
            elif kind == _GOAWAY:
                raise ConnectionResetError("the server said goodbye")


def _frame(kind: int, flags: int, stream: int, contents: bytes = b"") -> bytes:
    return len(contents).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + contents


def _request_headers(path: str, authority: str) -> bytes:
    """HPACK without its table: indexed where RFC 7541 lists the pair, else a literal that nobody need remember."""
    method_post, scheme_http, name_path, name_authority = b"\x83", b"\x86", b"\x04", b"\x01"
    name_content_type = b"\x0f\x10"
    return b"".join(
        (
            method_post,
            scheme_http,
            name_path + _text(path),
            name_authority + _text(authority),
            name_content_type + _text("application/grpc"),
            b"\0" + _text("te") + _text("trailers"),
        )
    )


def _text(text: str) -> bytes:
    return bytes((len(text),)) + text.encode("ascii")
