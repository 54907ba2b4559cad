"""A TCP proxy that misbehaves as it is told to, between any two programs.

    async with Proxy(target) as proxy:
        ...  # connect to proxy.address
        proxy.up.hold()          # bytes towards the target wait: a partition, one way
        proxy.heal()
        proxy.reset()            # every connection ends with RST

What is held is delivered after `heal`, as TCP would send it again; what is `lose`d is
gone, and with it the connection's meaning: only `sever` may follow.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from types import TracebackType
from typing import Self

_READ_BYTES = 64 * 1024
_DRIP_SECONDS = 0.02


class Direction:
    """What happens to the bytes that flow one way."""

    def __init__(self, seed: int) -> None:
        self.latency_seconds = 0.0
        self.jitter = 0.0
        """Share of the latency by which it varies."""
        self.bytes_per_second = 0
        """0 is unlimited."""
        self.flip_every_bytes = 0
        """About how many bytes there are to one whose bit is flipped; 0 flips none."""
        self.num_flipped = 0
        self.num_bytes = 0
        self._random = random.Random(seed)
        self._open = asyncio.Event()
        self._open.set()

    def hold(self) -> None:
        """Nothing passes until `release`."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def passing(self, data: bytes) -> bytes:
        """Delays, and may change, what passes."""
        if self.latency_seconds:
            spread = self._random.uniform(-self.jitter, self.jitter)
            await asyncio.sleep(self.latency_seconds * (1 + spread))
        await self._open.wait()
        self.num_bytes += len(data)
        return self._flipped(data)

    def _flipped(self, data: bytes) -> bytes:
        # Frames of trajectories only: a flip in a small frame breaks the connection itself.
        if not self.flip_every_bytes or len(data) < 1024:
            return data
        if self._random.random() >= len(data) / self.flip_every_bytes:
            return data
        changed = bytearray(data)
        where = self._random.randrange(512, len(data))
        changed[where] ^= 1 << self._random.randrange(8)
        self.num_flipped += 1
        return bytes(changed)

    def pieces(self, data: bytes) -> list[bytes]:
        if not self.bytes_per_second:
            return [data]
        size = max(int(self.bytes_per_second * _DRIP_SECONDS), 1)
        return [data[start : start + size] for start in range(0, len(data), size)]


class Proxy:
    def __init__(self, target: str, *, seed: int = 0) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.up = Direction(seed)
        """Towards the target."""
        self.down = Direction(seed + 1)
        self.address = ""
        self._server: asyncio.Server | None = None
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.num_connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.heal()
        self.reset()

    def partition(self) -> None:
        self.up.hold()
        self.down.hold()

    def heal(self) -> None:
        for direction in (self.up, self.down):
            direction.release()
            direction.latency_seconds = direction.jitter = 0.0
            direction.bytes_per_second = direction.flip_every_bytes = 0

    def reset(self) -> None:
        """Both ends of every connection see RST."""
        for near, far in list(self._pairs):
            _abort(near)
            _abort(far)

    def forget_target(self) -> None:
        """Half-open: the near end sees RST, the far end hears nothing any more."""
        for near, _ in list(self._pairs):
            _abort(near)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            _abort(writer)
            return
        pair = (writer, far_writer)
        self._pairs.add(pair)
        self.num_connections += 1
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_pump(reader, far_writer, self.up))
                tasks.create_task(_pump(far_reader, writer, self.down))
        finally:
            self._pairs.discard(pair)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_READ_BYTES):
            for piece in direction.pieces(await direction.passing(data)):
                writer.write(piece)
                await writer.drain()
                if direction.bytes_per_second:
                    await asyncio.sleep(_DRIP_SECONDS)
        writer.write_eof()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Closes with RST rather than FIN."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
