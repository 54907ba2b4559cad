"""Serves one environment until it is told to stop.

One task group holds the workers' keepers, the calls under way and the reaper.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from environments.base import Description, Form
from environments.batching import BatchedHost
from environments.hosts import Host, SingleTurnHost, SteppedHost
from environments.pool import WorkerPool
from environments.service import EnvironmentService
from environments.worker_process import EnvironmentSpec, Loaded, WorkerLimits
from penstock import rpc
from penstock.errors import ConfigError, EnvironmentFault, PenstockError
from penstock.signals import Stop
from penstock.v1 import environment_pb2
from penstock.v1.environment_pb2_grpc import add_EnvironmentServiceServicer_to_server

SERVICE_NAME = environment_pb2.DESCRIPTOR.services_by_name["EnvironmentService"].full_name
_DRAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    bind: str = "127.0.0.1:7081"
    """HOST:PORT to listen on; port 0 takes a free one."""
    insecure: bool = False
    """Allow addresses beyond loopback although nothing authenticates who connects."""
    workers: int = 2
    """Processes that run the environment's code. One with episodes of several turns holds one
    session a worker; a question and its scorer share them all."""
    call_seconds: float = 60.0
    """Bound on one call of the environment's code, whatever the caller's deadline allows."""
    scorer_seconds: float = 10.0
    """Bound on scoring one answer; beyond it the reward's status is SCORER_TIMEOUT."""
    start_seconds: float = 300.0
    """How long a worker may take to import and construct the environment."""
    session_ttl_seconds: float = 0.0
    """Close a session without a call for this long; 0 leaves the choice to the environment."""
    memory_mib: int = 4096
    """Private memory that one worker may hold."""
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        rpc.split_address(self.bind)
        if not 1 <= self.workers <= 1024:
            raise ConfigError(f"workers is {self.workers}; expected 1 to 1024")
        for name in ("call_seconds", "scorer_seconds", "start_seconds"):
            if not 0 < getattr(self, name) <= 86_400:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0, at most 86400")
        if self.session_ttl_seconds and not 0.1 <= self.session_ttl_seconds <= 86_400:
            raise ConfigError(
                f"session_ttl_seconds is {self.session_ttl_seconds}; expected 0, or 0.1 to 86400"
            )
        if self.memory_mib < 64:
            raise ConfigError(f"memory_mib is {self.memory_mib}; expected at least 64")


async def serve(
    spec: EnvironmentSpec, config: ServerConfig, stop: Stop, on_ready: Callable[[Description, int], None]
) -> None:
    """Serves until `stop`; tells `on_ready` what, and at which port. Raises ConfigError, EnvironmentFault."""
    failure: PenstockError | None = None
    async with asyncio.TaskGroup() as group:
        pool = WorkerPool(spec, num_workers=config.workers, group=group)
        stopping = group.create_task(stop.wait(), name="stop")
        try:
            await _serve(pool, config, group, stopping, on_ready)
        except (ConfigError, EnvironmentFault) as error:
            failure = error
        finally:
            stopping.cancel()
            pool.stop()
    if failure is not None:
        raise failure


async def _serve(
    pool: WorkerPool,
    config: ServerConfig,
    group: asyncio.TaskGroup,
    stopping: asyncio.Task[None],
    on_ready: Callable[[Description, int], None],
) -> None:
    server = rpc.server()
    port = rpc.bind(server, config.bind, insecure=config.insecure)
    loading = pool.start()
    first: set[asyncio.Future[Any]] = {loading, stopping}
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        return
    host = _host(loading.result(), pool, config)
    service = EnvironmentService(host, group=group, call_seconds=config.call_seconds)
    add_EnvironmentServiceServicer_to_server(service, server)
    health = rpc.add_standard_services(server, [SERVICE_NAME])
    reaper = group.create_task(service.reap(), name="reaper of expired sessions")
    try:
        async with rpc.serving(server, grace_seconds=_DRAIN_SECONDS):
            on_ready(host.description, port)
            try:
                await stopping
            finally:
                await health.enter_graceful_shutdown()
                service.end_streams()
    finally:
        reaper.cancel()
        service.stop()


def _host(loaded: Loaded, pool: WorkerPool, config: ServerConfig) -> Host:
    if config.session_ttl_seconds:
        description = replace(loaded.description, session_ttl_seconds=config.session_ttl_seconds)
        loaded = loaded._replace(description=description)
    match loaded.form:
        case Form.STEPPED:
            return SteppedHost(loaded.description, pool)
        case Form.SINGLE_TURN:
            return SingleTurnHost(loaded.description, pool, scorer_seconds=config.scorer_seconds)
        case Form.BATCHED:
            return BatchedHost(loaded.description, pool, scorer_seconds=config.scorer_seconds)


def spec_of(target: str, options: Mapping[str, object], config: ServerConfig) -> EnvironmentSpec:
    limits = WorkerLimits(memory_bytes=config.memory_mib * 1024 * 1024)
    return EnvironmentSpec(target=target, options=options, limits=limits, start_seconds=config.start_seconds)
