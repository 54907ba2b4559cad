import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from penstock import rpc
from penstock.errors import ConfigError

METHOD = "/penstock.test/Hold"


class Holding:
    """A server whose calls last until they are let go."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self.requests: list[bytes] = []
        self.go_on = asyncio.Event()
        handlers = {"Hold": grpc.unary_unary_rpc_method_handler(self._hold)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("penstock.test", handlers),))

    async def _hold(self, request: bytes, context: Any) -> bytes:
        self.requests.append(request)
        await self.go_on.wait()
        return request


@pytest.fixture
async def holding() -> AsyncIterator[tuple[Holding, str]]:
    server = rpc.server(max_calls_per_connection=2)
    made = Holding(server)
    port = rpc.bind(server, "127.0.0.1:0")
    async with rpc.serving(server, grace_seconds=0):
        yield made, f"127.0.0.1:{port}"
        made.go_on.set()


async def until_open(holding: Holding, number: int) -> None:
    async with asyncio.timeout(10.0):
        while len(holding.requests) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def crowded(address: str, holding: Holding) -> AsyncIterator[None]:
    """One channel that has more calls open than it may."""
    async with rpc.channel(address) as channel:
        calls = [channel.unary_unary(METHOD)(b"greedy", timeout=10.0) for _ in range(5)]
        await until_open(holding, 2)
        yield
        for call in calls:
            call.cancel()


async def test_a_connection_has_so_many_calls_open_and_no_more(holding: tuple[Holding, str]):
    server, address = holding
    async with crowded(address, server):
        await asyncio.sleep(0.1)
        assert server.requests == [b"greedy"] * 2


async def test_one_channel_that_uses_its_calls_up_leaves_the_next_one_its_own(holding: tuple[Holding, str]):
    server, address = holding
    async with crowded(address, server), rpc.channel(address) as channel:
        call = channel.unary_unary(METHOD)(b"modest", timeout=10.0)
        await until_open(server, 3)
        server.go_on.set()
        assert await call == b"modest"


async def test_a_server_is_stopped_when_what_it_serves_fails():
    server = rpc.server()
    made = Holding(server)
    address = f"127.0.0.1:{rpc.bind(server, '127.0.0.1:0')}"
    async with rpc.channel(address) as channel:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            async with rpc.serving(server, grace_seconds=0):
                call = channel.unary_unary(METHOD)(b"held", timeout=10.0)
                await until_open(made, 1)
                raise RuntimeError("the disk is gone")
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    with contextlib.closing(socket.create_server(("127.0.0.1", int(address.rpartition(":")[2])))):
        """Nobody listens there any more."""


@pytest.mark.parametrize("address", ["127.0.0.1:7070", "learner.example:1", "[::1]:7070", "[2001:db8::7]:0"])
def test_an_address_is_split_and_joined(address: str) -> None:
    assert rpc.join_address(*rpc.split_address(address)) == address


@pytest.mark.parametrize(
    "address", ["::1:7070", "[::1:7070", "::1]:7070", "[::1]", "7070", ":7070", "a:70700"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"expected \[?HOST"):
        rpc.split_address(address)
