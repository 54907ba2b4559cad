"""gRPC servers and channels as every penstock process uses them.

Every server has the standard health and reflection services. Loopback is the
default; another address must be asked for with `insecure`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Sequence

import grpc
from google.protobuf import duration_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penstock.errors import ConfigError

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_SHARED_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
SERVER_OPTIONS = (
    *_SHARED_OPTIONS,
    # Identity only: a few kilobytes of gzip would be inflated before their size is checked.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Without this, a second server on a taken port shares it in silence.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 2),
)
MAX_CALLS_PER_CONNECTION = 16
"""Open at once, on a server that many strangers may reach. An actor has four."""
CHANNEL_OPTIONS = (
    *_SHARED_OPTIONS,
    # A connection for each channel: else all channels of a process share one, and its server's bound on calls.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # How long an attempt to connect may take, at the least: a far or busy peer is not given up after one round trip.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
)


def split_address(address: str) -> tuple[str, int]:
    """Splits HOST:PORT, or [HOST]:PORT for IPv6. Raises ConfigError."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is not an address; expected HOST:PORT, such as 127.0.0.1:7070")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"{address!r} is not an address; expected [HOST]:PORT for IPv6, such as [::1]:7070")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around a host that is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def server(*, max_calls_per_connection: int | None = None) -> grpc.aio.Server:
    """max_calls_per_connection: open at once; further ones wait on the client, or are reset unread."""
    bound = (
        ()
        if max_calls_per_connection is None
        else (("grpc.max_concurrent_streams", max_calls_per_connection),)
    )
    return grpc.aio.server(options=(*SERVER_OPTIONS, *bound))


def bind(server: grpc.aio.Server, address: str, *, insecure: bool = False) -> int:
    """Listens on HOST:PORT; port 0 takes a free one. Returns the port. Raises ConfigError."""
    if not is_loopback(address) and not insecure:
        raise ConfigError(
            f"{address} is not a loopback address, and nothing would authenticate who connects: "
            "bind 127.0.0.1, or pass --insecure true on a network that you trust"
        )
    if not is_loopback(address):
        _log.warning("insecure: anybody who reaches %s can join, read and stop this service", address)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(f"cannot listen on {address}: the port is in use or the address is not this host's")
    return port


def add_standard_services(server: grpc.aio.Server, services: Sequence[str]) -> health.aio.HealthServicer:
    """Adds health (SERVING for each service at once) and reflection."""
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    for name in ("", *services):
        servicer._server_status[name] = health_pb2.HealthCheckResponse.SERVING
    return servicer


@contextlib.asynccontextmanager
async def serving(server: grpc.aio.Server, *, grace_seconds: float) -> AsyncIterator[None]:
    """Starts a server, and stops it whatever happens.

    Until it is stopped, gRPC's threads write what the next call brings into objects of its event loop: when those
    are gone, into whatever lies there.
    """
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace_seconds)


def channel(address: str) -> grpc.aio.Channel:
    split_address(address)
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def to_duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def to_seconds(duration: duration_pb2.Duration) -> float:
    return duration.ToNanoseconds() / 1e9
