"""The coordinator's process: gRPC for actors, trainer and operators. Imports no torch.

    python -m learner.coordinator RUN_DIR/config.toml

Prints `coordinator ready on HOST:PORT` once it accepts connections.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import signal
import time
from collections.abc import Callable, Sequence

import uvloop

from environments.base import Description
from environments.client import EnvironmentClient
from learner.config import RunConfig
from learner.coordinator import descriptions
from learner.coordinator.actor_service import ActorService, Welcome
from learner.coordinator.ballast import Ballast
from learner.coordinator.broadcasts import Broadcasts
from learner.coordinator.core import STANDSTILL_SECONDS, Coordinator
from learner.coordinator.evaluation.log import EvaluationLog
from learner.coordinator.evaluation.plan import EVAL, EvaluationSource, Plan
from learner.coordinator.ledger import Ledger, Recovered
from learner.coordinator.metrics import serve_metrics
from learner.coordinator.operator_service import OperatorService
from learner.coordinator.publications import Publications
from learner.coordinator.scheduler import Scheduler
from learner.coordinator.sieve import Sieve
from learner.coordinator.tasks import TRAIN, TaskOrder, TaskSource
from learner.coordinator.trainer_service import TrainerService
from learner.coordinator.validation import Limits
from learner.coordinator.weights_service import WeightsService
from penstock import config, log, parent, rpc
from penstock.codec import manifest_from_wire
from penstock.errors import ConfigError, EnvironmentFault, LedgerError, Stopped
from penstock.memory import collect_rarely, keep_arrays
from penstock.policy_files import PolicyFolder, read_policy_folder
from penstock.processes import allow_most_files
from penstock.signals import Stop
from penstock.tasks import task_group
from penstock.v1 import (
    coordinator_pb2,
    coordinator_pb2_grpc,
    operator_pb2_grpc,
    trainer_pb2_grpc,
    weights_pb2,
    weights_pb2_grpc,
)
from penstock.watchdog import Watchdog, watch_loop
from penstock.weights.manifest import SharedMemoryMedium
from penstock.weights.media.zeromq import ZeromqServer
from penstock.weights.segment import writer_is_alive

_log = logging.getLogger(__name__)

ENVIRONMENT_PATIENCE_SECONDS = 60.0
KNOWN_ENVIRONMENT_PATIENCE_SECONDS = 5.0
"""With one that the run knows from before: it goes on without an answer."""
FAREWELL_SECONDS = 3.0
"""For how long, at least, a finished run still answers."""
ACTORS_LEAVE_SECONDS = 10.0
SERVICES = tuple(
    f"penstock.v1.{name}"
    for name in ("CoordinatorService", "OperatorService", "TrainerService", "WeightsService")
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Environments:
    endpoints: tuple[coordinator_pb2.EnvironmentEndpoint, ...]
    """Of training and of evaluations."""
    sources: tuple[TaskSource, ...]
    evaluated: tuple[EvaluationSource, ...]
    silent: tuple[str, ...]
    """Addresses where nobody answered: what is known of them is from before."""


def main(argv: Sequence[str]) -> int:
    parent.follow(signal.SIGKILL)
    log.configure()
    allow_most_files()
    settings = config.load(
        RunConfig, argv, prog="python -m learner.coordinator", description="Coordinate a run."
    )
    uvloop.run(_serve(settings))
    return 0


async def _serve(settings: RunConfig) -> None:
    stop = Stop()
    stop.on_signals()
    policy = read_policy_folder(settings.policy)
    environments = await _describe(settings, stop)
    failures: list[LedgerError] = []
    loop = asyncio.get_running_loop()

    def on_fatal(error: LedgerError) -> None:
        failures.append(error)
        loop.call_soon_threadsafe(stop.set, str(error))

    ledger = Ledger(settings.run_dir / "ledger.sqlite", on_fatal=on_fatal)
    ballast = Ballast(settings.run_dir / "ledger.ballast", settings.ledger.disk.ballast_bytes)
    ballast.hold()
    try:
        await _run(settings, policy, environments, ledger, stop, on_full_disk=on_fatal)
    finally:
        ballast.release()
        await asyncio.to_thread(ledger.close)
    if failures:
        raise failures[0]


async def _run(
    settings: RunConfig,
    policy: PolicyFolder,
    environments: _Environments,
    ledger: Ledger,
    stop: Stop,
    *,
    on_full_disk: Callable[[LedgerError], None],
) -> None:
    host, _ = rpc.split_address(settings.bind)
    found = ledger.recover()
    scheduler = _restore(settings, policy, environments, ledger, found)
    coordinator = Coordinator(
        scheduler, ledger, stop, run_id=found.run_id, disk=settings.ledger.disk, on_full_disk=on_full_disk
    )
    for address in environments.silent:
        scheduler.note_event("environment", f"{address} does not answer; going on with what it said before")
    weights_server = ZeromqServer(f"tcp://{rpc.join_address(host, settings.weights.port)}")
    broadcasts = Broadcasts(coordinator, settings.weights, host=host, device=settings.training.device)
    publications = Publications(weights_server, broadcasts.offer)
    scheduler.evaluations.is_held = lambda version: publications.get(version) is not None
    EvaluationLog(settings.run_dir).restore(found.evaluations.results)
    _resume(coordinator, publications, found)
    server = rpc.server(max_calls_per_connection=rpc.MAX_CALLS_PER_CONNECTION)
    welcome = Welcome(
        found.run_id, environments.endpoints, policy.listing(), settings.fleet, settings.truncation_reward
    )
    trained = {source.environment for source in environments.sources}
    addresses = {e.name: e.address for e in environments.endpoints if e.name in trained}
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(
        ActorService(coordinator, publications, broadcasts, welcome), server
    )
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(
        TrainerService(
            coordinator,
            publications,
            keep_checkpoints=settings.training.checkpoint.keep,
            keep_payloads=settings.ledger.keep_payloads,
        ),
        server,
    )
    operator_pb2_grpc.add_OperatorServiceServicer_to_server(
        OperatorService(coordinator, broadcasts, settings.schedule, addresses), server
    )
    weights_pb2_grpc.add_WeightsServiceServicer_to_server(
        WeightsService(coordinator, publications, policy), server
    )
    rpc.add_standard_services(server, SERVICES)
    try:
        port = rpc.bind(server, settings.bind, insecure=settings.insecure)
        async with rpc.serving(server, grace_seconds=2.0):
            if settings.metrics_bind:
                serve_metrics(settings.metrics_bind, coordinator, broadcasts, insecure=settings.insecure)
            keep_arrays()
            collect_rarely()
            print(f"coordinator ready on {rpc.join_address(host, port)}", flush=True)  # noqa: T201
            with Watchdog() as loop_watchdog, Watchdog(guards_interpreter=False) as ledger_watchdog:
                coordinator.watchdog = ledger_watchdog
                await _until_stopped(coordinator, broadcasts, loop_watchdog)
    finally:
        broadcasts.close()
        await asyncio.to_thread(weights_server.close)


async def _until_stopped(coordinator: Coordinator, broadcasts: Broadcasts, watchdog: Watchdog) -> None:
    stop = coordinator.stop
    async with task_group() as tasks:
        tasks.create_task(watch_loop(watchdog, stop, seconds=STANDSTILL_SECONDS), name="watch-loop")
        tasks.create_task(coordinator.tick_forever(), name="tick")
        tasks.create_task(coordinator.commit_ticks(), name="commit-ticks")
        tasks.create_task(_stop_when_finished(coordinator), name="farewell")
        tasks.create_task(broadcasts.run(), name="broadcasts")


def _sieve(settings: RunConfig) -> Sieve | None:
    recipe = settings.algorithm.recipe()
    if not recipe.dynamic_sampling:
        return None
    return Sieve(max_dropped=recipe.max_refills * settings.schedule.groups_per_step)


def _plan(settings: RunConfig, sources: Sequence[EvaluationSource]) -> Plan:
    evaluation = settings.evaluation
    return Plan(
        sources,
        samples=evaluation.samples_per_prompt,
        seed=evaluation.seed,
        sampling=evaluation.sampling(settings.sampling.max_tokens),
    )


def _restore(
    settings: RunConfig, policy: PolicyFolder, environments: _Environments, ledger: Ledger, found: Recovered
) -> Scheduler:
    scheduler = Scheduler(
        schedule=settings.schedule,
        fleet=settings.fleet,
        breaker=settings.breaker,
        sampling=settings.sampling,
        tasks=TaskOrder(environments.sources, seed=settings.seed),
        limits=Limits(
            vocab_size=policy.vocab_size,
            max_sampled_tokens=max(settings.sampling.max_tokens, settings.evaluation.max_tokens),
            max_context=policy.max_context,
        ),
        sieve=_sieve(settings),
        evaluation=settings.evaluation,
        plan=_plan(settings, environments.evaluated),
        history=ledger,
    )
    scheduler.restore(
        epoch=found.epoch,
        from_step=found.from_step,
        num_sessions=found.num_sessions,
        next_group_id=found.next_group_id,
        open_groups=found.open_groups,
        assigned=found.assigned,
        live_leases=found.live_leases,
        versions=found.versions,
        paused=found.paused,
        now=time.monotonic(),
    )
    scheduler.evaluations.restore(found.evaluations, time.monotonic())
    if found.next_group_id:
        _log.info(
            "run %s goes on: %d groups open, epoch %d", found.run_id, len(found.open_groups), found.epoch
        )
    if found.paused:
        _log.warning(
            "run %s was paused by an operator and still is: `penstock resume` ends that", found.run_id
        )
    return scheduler


def _resume(coordinator: Coordinator, publications: Publications, found: Recovered) -> None:
    """Goes on with the trainer of the newest lineage if it lives: this process alone was started again.

    Its lock on the newest version's segment tells. Otherwise nothing is announced and
    nothing leased until a trainer opens a lineage.
    """
    if found.newest is None or found.finished:
        return
    manifest = manifest_from_wire(weights_pb2.WeightManifest.FromString(found.newest.manifest))
    local = [medium for medium in manifest.media if isinstance(medium, SharedMemoryMedium)]
    if not any(writer_is_alive(medium) for medium in local):
        return
    publications.publish(manifest)
    coordinator.scheduler.lineage.resume(found.newest.version)
    coordinator.scheduler.evaluations.resume(found.newest.version, manifest.digest, coordinator.clock())
    coordinator.step_metrics = json.loads(found.newest.metrics)
    _log.info("the trainer lives: going on from version %s", found.newest.version)


async def _describe(settings: RunConfig, stop: Stop) -> _Environments:
    """Asks every environment what it is. Raises ConfigError if one that is new to the run does not answer in time."""
    evaluated = settings.evaluation.environments or settings.environments
    if not settings.evaluation.every_steps:
        evaluated = ()
    known_before = descriptions.load(settings.run_dir)
    silent: list[str] = []
    described: dict[str, Description] = {}
    for address in dict.fromkeys((*settings.environments, *evaluated)):
        async with EnvironmentClient(address) as client:
            known = known_before.get(address)
            description = await _patiently(client, address, stop, known)
            if description is known:
                silent.append(address)
        if description.name in {known.name for known in described.values()}:
            raise ConfigError(
                f"environment {description.name!r} is served at two addresses; expected distinct names"
            )
        described[address] = description
    for address in settings.environments:
        if TRAIN not in described[address].splits:
            raise ConfigError(f"environment {described[address].name!r} at {address} has no split {TRAIN!r}")
    descriptions.save(settings.run_dir, described)
    endpoints = [
        coordinator_pb2.EnvironmentEndpoint(
            name=description.name,
            address=address,
            version=description.version,
            digest=description.digest,
        )
        for address, description in described.items()
    ]
    sources = [
        TaskSource(environment=found.name, num_tasks=found.splits[TRAIN])
        for found in (described[address] for address in settings.environments)
    ]
    num_prompts = settings.evaluation.num_prompts
    return _Environments(
        tuple(endpoints),
        tuple(sources),
        tuple(_evaluated(address, described[address], num_prompts) for address in evaluated),
        tuple(silent),
    )


def _evaluated(address: str, description: Description, num_prompts: int) -> EvaluationSource:
    """Raises ConfigError."""
    if EVAL not in description.splits:
        raise ConfigError(
            f"environment {description.name!r} at {address} has no split {EVAL!r}, so it cannot be evaluated on: "
            "name in evaluation.environments those that have one"
        )
    num_tasks = description.splits[EVAL] or num_prompts
    if num_tasks < num_prompts:
        _log.info("environment %s has %d evaluation tasks; all are played", description.name, num_tasks)
    return EvaluationSource(environment=description.name, num_prompts=min(num_prompts, num_tasks))


async def _patiently(
    client: EnvironmentClient, address: str, stop: Stop, known: Description | None
) -> Description:
    """known: what the environment said when the run went on last; taken if it does not answer."""
    patience = ENVIRONMENT_PATIENCE_SECONDS if known is None else KNOWN_ENVIRONMENT_PATIENCE_SECONDS
    deadline = time.monotonic() + patience
    while True:
        try:
            return await client.describe()
        except EnvironmentFault as fault:
            left = deadline - time.monotonic()
            if left <= 0 and known is not None:
                _log.warning("environment %s (%s) does not answer; going on: %s", known.name, address, fault)
                return known
            if left <= 0:
                raise ConfigError(
                    f"environment {address}: {fault}; start it with `penstock env serve`, or correct "
                    "`environments` in the run's configuration"
                ) from fault
            _log.info("waiting for environment %s, %.0f s more: %s", address, left, fault)
        if await stop.sleep(1.0):
            raise Stopped(f"stopped while waiting for environment {address}")


async def _stop_when_finished(coordinator: Coordinator) -> None:
    """Ends the process some time after the run: once every actor has left, or soon after."""
    stop = coordinator.stop
    while not (coordinator.scheduler.finished or await stop.sleep(0.2)):
        pass
    await stop.sleep(FAREWELL_SECONDS)
    deadline = time.monotonic() + ACTORS_LEAVE_SECONDS
    while len(coordinator.scheduler.fleet) and time.monotonic() < deadline:
        if await stop.sleep(0.2):
            return
    stop.set("the run is finished")
