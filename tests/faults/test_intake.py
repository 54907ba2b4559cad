"""What is malformed, too large, too much or too slow: refused, counted, and nobody else's trouble."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from penstock import PROTOCOL
from penstock.rpc import MAX_MESSAGE_BYTES
from penstock.trajectory import Lease, PolicyVersion, Reward, RewardStatus, Task, Trajectory, VersionSpan
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import coordinator_pb2_grpc

from .bench import PATIENT_FLEET, VOCAB_SIZE, Bench, FaultLength, until
from .raw_actor import RawActor, item
from .scripted_actor import Script, trajectory_of

MEBIBYTE = 1024 * 1024

Poison = Callable[[Trajectory, random.Random], Trajectory]


def changed(**fields: Any) -> Poison:
    return lambda trajectory, rng: dataclasses.replace(trajectory, **fields)


def with_logprob(value: float) -> Poison:
    def poison(trajectory: Trajectory, rng: random.Random) -> Trajectory:
        logprobs = trajectory.logprobs.copy()
        logprobs[rng.randrange(2, len(logprobs))] = value
        return dataclasses.replace(trajectory, logprobs=logprobs)

    return poison


def with_token(value: int) -> Poison:
    def poison(trajectory: Trajectory, rng: random.Random) -> Trajectory:
        token_ids = trajectory.token_ids.copy()
        token_ids[rng.randrange(len(token_ids))] = value
        return dataclasses.replace(trajectory, token_ids=token_ids)

    return poison


def cut(name: str) -> Poison:
    return lambda trajectory, rng: dataclasses.replace(trajectory, **{name: getattr(trajectory, name)[:-1]})


def mask_of(value: int) -> Poison:
    def poison(trajectory: Trajectory, rng: random.Random) -> Trajectory:
        return dataclasses.replace(trajectory, loss_mask=np.full_like(trajectory.loss_mask, value))

    return poison


def spans(*made: tuple[PolicyVersion, int]) -> Poison:
    return changed(versions=tuple(VersionSpan(version, count) for version, count in made))


FIRST = PolicyVersion(1, 0)
POISONS: list[tuple[str, Poison]] = [
    ("non_finite_logprob", with_logprob(float("nan"))),
    ("non_finite_logprob", with_logprob(float("-inf"))),
    ("positive_logprob", with_logprob(0.5)),
    ("token_out_of_range", with_token(VOCAB_SIZE)),
    ("token_out_of_range", with_token(-1)),
    ("bad_lengths", cut("logprobs")),
    ("bad_lengths", cut("token_ids")),
    ("bad_mask", mask_of(0)),
    ("bad_mask", mask_of(2)),
    ("bad_versions", spans((FIRST, 2))),
    ("bad_versions", spans((FIRST, 1), (FIRST, 2))),
    ("unknown_version", spans((PolicyVersion(1, 40), 3))),
    ("unknown_version", spans((PolicyVersion(7, 0), 3))),
    ("unknown_lease", changed(lease_id="4000.0.0")),
    ("unknown_lease", changed(lease_id="")),
    ("wrong_task", changed(task=Task("scripted", "train", 999, 1))),
    ("bad_reward", changed(reward=Reward.valid(float("nan")))),
    ("bad_reward", changed(reward=Reward(status=RewardStatus.INFRASTRUCTURE_ERROR))),
    ("bad_reward", changed(metrics={"speed": float("inf")})),
    ("bad_id", changed(trajectory_id="no such id")),
]


async def test_poison_among_the_good_is_refused_by_code_and_never_trained(
    tmp_path: Path, fault_length: FaultLength
):
    num_leases = fault_length.of(short=512, long=5120)
    rng = random.Random(0)
    schedule = {"num_steps": num_leases // 32, "groups_per_step": 8, "max_lag": num_leases // 32}
    async with Bench(tmp_path, fleet=PATIENT_FLEET, **schedule) as bench:
        await bench.start()
        async with RawActor(bench.address) as raw:
            leases = await raw.acquire(num_leases)
            assert len(leases) == num_leases
            expected: Counter[str] = Counter()
            items: list[pb.SubmitItem] = []
            codes: list[str] = []
            for lease in leases:
                for code, trajectory in pair(lease, raw.version, rng):
                    items.append(item(len(items) + 1, trajectory))
                    codes.append(code)
            messages = [items[start : start + 50] for start in range(0, len(items), 50)]
            answers = await raw.submit(*messages)
            found = [verdict for answer in answers for verdict in answer.verdicts]
            assert [code_of(verdict) for verdict in found] == codes
            expected.update(filter(None, codes))
            assert set(expected) == {code for code, _ in POISONS}
        await bench.trained()
        findings = bench.check()
        assert findings.trained == num_leases, "all that is good, and nothing else"
        counted = {
            name.removeprefix("rejected:"): n
            for name, n in bench.tally().items()
            if name.startswith("rejected:")
        }
        assert counted == dict(expected)


def pair(lease: Lease, version: PolicyVersion, rng: random.Random) -> list[tuple[str, Trajectory]]:
    """A bad trajectory and a good one of a lease, and the code that each must have."""
    good = trajectory_of(lease, [version] * 3)
    code, poison = POISONS[rng.randrange(len(POISONS))]
    bad = poison(dataclasses.replace(good, trajectory_id=f"{rng.getrandbits(128):032x}"), rng)
    return [(code, bad), ("", good)]


def code_of(verdict: pb.Verdict) -> str:
    if verdict.kind == pb.VERDICT_KIND_ACCEPTED:
        return ""
    return pb.RejectionCode.Name(verdict.code).removeprefix("REJECTION_CODE_").lower()


async def test_a_flood_of_stale_results_is_counted_and_trained_none_of(tmp_path: Path):
    """From an actor that is many versions behind what its leases were granted under."""
    async with Bench(tmp_path, num_steps=12, fleet=PATIENT_FLEET) as bench:
        await bench.start()
        bench.actor("good")
        await bench.reached(6)
        await bench.abandon("good")
        num_stale = 0
        async with RawActor(bench.address, "good") as raw:
            for _ in range(5):
                leases = await raw.acquire(8)
                items = [
                    item(number, trajectory_of(lease, [FIRST] * 3))
                    for number, lease in enumerate(leases, start=num_stale + 1)
                ]
                (answer,) = await raw.submit(items)
                assert {verdict.kind for verdict in answer.verdicts} == {pb.VERDICT_KIND_STALE}
                num_stale += len(items)
            bench.actor("good")
            await bench.trained()
        bench.check()
        assert num_stale >= 5
        assert bench.tally()["stale"] == num_stale


async def test_a_message_over_the_limit_is_refused_and_costs_no_memory(
    tmp_path: Path, fault_length: FaultLength
):
    """Plain, and as a few kilobytes that gzip makes large."""
    bomb_bytes = fault_length.of(short=128, long=512) * MEBIBYTE
    async with Bench(tmp_path, num_steps=3, fleet=PATIENT_FLEET) as bench:
        await bench.start()
        assert bench.coordinator is not None
        before = psutil.Process(bench.coordinator.pid).memory_info().rss
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(bench.address, options=options) as channel:
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            for num_bytes, compression in (
                (PLAIN_BYTES, grpc.Compression.NoCompression),
                (bomb_bytes, grpc.Compression.Gzip),
            ):
                request = pb.JoinRequest(actor_id="x" * num_bytes, protocol=PROTOCOL, num_slots=1)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Join(request, compression=compression, timeout=60.0)
                assert caught.value.code() in REFUSED
            metadata = tuple((f"key-{number}", "v" * 100) for number in range(10_000))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Join(pb.JoinRequest(), metadata=metadata, timeout=60.0)
            assert caught.value.code() in REFUSED
        peak = peak_bytes(bench.coordinator.pid)
        assert peak - before < 2 * MAX_MESSAGE_BYTES, "refused before it is allocated"
        bench.actor("a1")
        await bench.trained()
        bench.check()


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever held."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024


PLAIN_BYTES = 16 * MAX_MESSAGE_BYTES
REFUSED = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
)


async def test_a_crowd_of_strangers_does_not_keep_good_actors_from_working(
    tmp_path: Path, fault_length: FaultLength
):
    """Connections that say nothing, connections that say half a word, and calls without end."""
    num_connections = fault_length.of(short=200, long=1000)
    async with Bench(tmp_path, num_steps=10, fleet=PATIENT_FLEET) as bench:
        await bench.start()
        async with crowd(bench.address, num_connections), flood(bench.address):
            bench.actor("good")
            await bench.trained()
        findings = bench.check()
        assert findings.trained == 10 * 2 * 4


@contextlib.asynccontextmanager
async def crowd(address: str, num_connections: int) -> AsyncIterator[None]:
    """Half of them stop in the midst of the HTTP/2 preface."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for number in range(num_connections):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            if number % 2:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM")
        yield


@contextlib.asynccontextmanager
async def flood(address: str) -> AsyncIterator[None]:
    """Joins that are refused, one after another on each of ten connections."""

    async def call_forever() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await stub.Join(pb.JoinRequest(actor_id="stranger", protocol=999, num_slots=1))

    tasks = [asyncio.create_task(call_forever()) for _ in range(10)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def test_a_slow_trainer_makes_actors_wait_and_nobody_grow(tmp_path: Path):
    """Admission bounds what is made; nothing is dropped for it."""
    heavy = Script(token_bytes=5000)
    async with Bench(tmp_path, num_steps=10, max_lag=1, fleet=PATIENT_FLEET) as bench:
        await bench.start(step_seconds=0.5)
        actor = bench.actor("fast", script=heavy)
        await bench.reached(2)
        assert bench.coordinator is not None
        process = psutil.Process(bench.coordinator.pid)
        before = process.memory_info().rss
        await bench.reached(8)
        grown = process.memory_info().rss - before
        assert actor.actor is not None
        assert actor.actor.uplink.num_unacknowledged <= 2 * 2 * 4, "no more than is admitted"
        await bench.trained()
        findings = bench.check()
        assert grown < 32 * MEBIBYTE
        assert findings.accepted == findings.trained, "nothing was made in vain"


async def test_a_learner_that_stands_still_fills_spools_to_their_bound_and_no_further(tmp_path: Path):
    """Items wait on the actor while nothing is acknowledged, and go out when the learner wakes."""
    async with Bench(tmp_path, num_steps=6, max_lag=3, fleet=PATIENT_FLEET) as bench:
        await bench.start_coordinator()
        bench.start_trainer()
        actor = bench.actor("fast", script=Script(num_tokens=lambda lease: 20, token_seconds=0.02))
        # Its own word for it: a lease that the learner has granted may still be on its way.
        await until(lambda: actor.actor is not None and actor.actor.num_rollouts, "rollouts")
        assert bench.coordinator is not None
        bench.coordinator.send(signal.SIGSTOP)
        assert actor.actor is not None
        uplink = actor.actor.uplink
        await until(lambda: uplink.num_unacknowledged > 0, "results that nobody acknowledges")
        held = actor.actor.held_leases()
        await asyncio.sleep(1.0)
        assert set(actor.actor.held_leases()) <= set(held), "no work beyond what was leased"
        bench.coordinator.send(signal.SIGCONT)
        await bench.trained()
        bench.check()
