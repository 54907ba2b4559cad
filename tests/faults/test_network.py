"""Networks that delay, break, lie and fall silent, between actors and the learner."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from penstock.codec import task_from_wire, trajectory_to_wire, version_from_wire
from penstock.trajectory import Lease, PolicyVersion, Sampling, Task, VersionSpan
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1.trajectory_pb2 import Trajectory

from .bench import PATIENT_FLEET, QUICK_FLEET, RESTART_FLEET, Bench, refused_with, until
from .proxy import Proxy
from .raw_actor import RawActor, item
from .scripted_actor import Script, fixed, trajectory_of

FORGETFUL_FLEET = dataclasses.replace(PATIENT_FLEET, suspect_seconds=1.0)
"""Nobody is declared dead, but a lease that was lost with its answer is soon granted again."""
SLOW = Script(num_tokens=fixed(20), token_seconds=0.05)


async def distant(bench: Bench, proxy: Proxy, script: Script = SLOW) -> None:
    """An actor behind the proxy that holds leases."""
    bench.actor("distant", script=script, address=proxy.address)
    await bench.when(lambda status: any(actor.num_leases for actor in status.actors), "leases")


@contextlib.asynccontextmanager
async def every(seconds: float, action: Callable[[], object]) -> AsyncIterator[None]:
    async def repeat() -> None:
        while True:
            await asyncio.sleep(seconds)
            action()

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()


async def test_a_short_partition_costs_no_lease(tmp_path: Path):
    async with Bench(tmp_path, num_steps=6, fleet=PATIENT_FLEET) as bench:
        await bench.start()
        async with Proxy(bench.address) as proxy:
            await distant(bench, proxy)
            proxy.partition()
            await asyncio.sleep(1.0)
            proxy.heal()
            await bench.trained()
        bench.check()
        assert not bench.events("dead")
        attempts = {attempt for (attempt,) in bench.rows("SELECT attempt FROM leases")}
        assert attempts == {0}, "nothing was leased twice"


@pytest.mark.parametrize(
    "how",
    [
        "both ways",
        pytest.param("towards the learner", marks=pytest.mark.slow),
        pytest.param("towards the actor", marks=pytest.mark.slow),
        "half-open",
    ],
)
async def test_a_long_partition_leases_again_and_trains_nothing_twice(tmp_path: Path, how: str):
    async with Bench(tmp_path, num_steps=8) as bench:
        await bench.start(step_seconds=0.1)
        async with Proxy(bench.address) as proxy:
            await distant(bench, proxy)
            if how == "half-open":
                proxy.partition()
                proxy.forget_target()
            if how in ("both ways", "towards the learner"):
                proxy.up.hold()
            if how in ("both ways", "towards the actor"):
                proxy.down.hold()
            if how != "towards the actor":
                await until(lambda: bench.events("dead"), "the distant actor to be given up")
            bench.actor("near", script=SLOW)
            await bench.reached(2)
            proxy.heal()
            await bench.trained()
        bench.check()


@pytest.mark.parametrize("latency_seconds", [pytest.param(0.05, marks=pytest.mark.slow), 0.2])
async def test_a_slow_link_only_takes_longer(tmp_path: Path, latency_seconds: float):
    async with Bench(tmp_path, num_steps=4, fleet=PATIENT_FLEET) as bench:
        await bench.start()
        async with Proxy(bench.address) as proxy:
            for direction in (proxy.up, proxy.down):
                direction.latency_seconds, direction.jitter = latency_seconds / 2, 0.1
            await distant(bench, proxy, Script())
            await bench.trained()
        bench.check()


async def test_a_dripping_link_only_takes_longer(tmp_path: Path):
    async with Bench(tmp_path, num_steps=3, fleet=PATIENT_FLEET) as bench:
        await bench.start()
        async with Proxy(bench.address) as proxy:
            proxy.up.bytes_per_second = 40_000
            await distant(bench, proxy, Script(token_bytes=200))
            await bench.trained()
        bench.check()


async def test_connections_that_are_reset_again_and_again_lose_nothing(tmp_path: Path):
    async with Bench(tmp_path, num_steps=8, fleet=FORGETFUL_FLEET) as bench:
        await bench.start(step_seconds=0.3)
        async with Proxy(bench.address) as proxy, every(1.0, proxy.reset):
            await distant(bench, proxy, Script(num_tokens=fixed(20), token_seconds=0.01))
            await bench.trained()
            assert proxy.num_connections > 2
        bench.check()


def lease_named(lease_id: str, task: Task) -> Lease:
    group_id, slot, attempt = map(int, lease_id.split("."))
    return Lease(
        lease_id=lease_id,
        group_id=group_id,
        slot=slot,
        attempt=attempt,
        task=task,
        sampling=Sampling(),
        progress_timeout_seconds=1.0,
    )


async def test_a_bit_that_flips_on_the_way_is_found_and_what_it_hit_is_sent_again(tmp_path: Path):
    """Without TLS, and past TCP's checksum: what is trained is what was made, bit for bit."""
    async with Bench(tmp_path, num_steps=8, fleet=RESTART_FLEET, keep_payloads=True) as bench:
        await bench.start()
        async with Proxy(bench.address) as proxy:
            proxy.up.flip_every_bytes = 100_000
            await distant(bench, proxy, Script(token_bytes=300))
            await bench.trained()
            assert proxy.up.num_flipped > 0
        bench.check()
        assert bench.tally().get("rejected:corrupt", 0) > 0
        kept = [Trajectory.FromString(payload) for payload in bench.payloads()]
        assert len(kept) >= 8 * 2 * 4
        for each in kept:
            versions = [VersionSpan(version_from_wire(s.version), s.num_tokens) for s in each.versions]
            lease = lease_named(each.lease_id, task_from_wire(each.task))
            stamps = [span.version for span in versions for _ in range(span.num_tokens // 300)]
            assert each == trajectory_to_wire(trajectory_of(lease, stamps, author="distant", copies=300))


async def test_an_acknowledgement_that_is_lost_is_answered_as_a_duplicate(tmp_path: Path):
    async with Bench(tmp_path, num_steps=6, fleet=FORGETFUL_FLEET) as bench:
        await bench.start()
        async with Proxy(bench.address) as proxy:
            await distant(bench, proxy)
            await bench.when(lambda status: any(actor.stats.num_tokens for actor in status.actors), "tokens")
            proxy.down.hold()
            await bench.when(lambda status: status.ledger.accepted > 0, "something to be on disk")
            proxy.reset()
            proxy.heal()
            await bench.trained()
        bench.check()
        assert bench.tally().get("duplicate", 0) + bench.tally().get("surplus", 0) > 0


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """With a version published, and actors as patient as can be."""
    async with Bench(tmp_path, num_steps=50, groups_per_step=8, fleet=PATIENT_FLEET) as made:
        await made.start()
        yield made


def numbered(leases: list[Lease], version: PolicyVersion, *, first: int = 1) -> list[pb.SubmitItem]:
    """The leases' trajectories as items."""
    return [
        item(number, trajectory_of(lease, [version] * 3)) for number, lease in enumerate(leases, start=first)
    ]


async def test_what_is_delivered_ten_times_is_stored_once(bench: Bench):
    async with RawActor(bench.address) as raw:
        leases = await raw.acquire(4)
        answers = await raw.submit(*[numbered(leases, raw.version)] * 10)
        kinds = [verdict.kind for answer in answers for verdict in answer.verdicts]
        assert kinds == [pb.VERDICT_KIND_ACCEPTED] * 4 + [pb.VERDICT_KIND_DUPLICATE] * 36
        assert {answer.acknowledged for answer in answers} == {4}
        (answer,) = await raw.submit(numbered(leases, raw.version, first=5))
        assert {verdict.kind for verdict in answer.verdicts} == {pb.VERDICT_KIND_DUPLICATE}
        await bench.when(lambda status: status.ledger.duplicates == 40, "40 duplicates")
        assert (await bench.status()).ledger.accepted == 4


async def test_a_gap_or_another_order_is_answered_with_where_to_go_on(bench: Bench):
    async with RawActor(bench.address) as raw:
        leases = await raw.acquire(4)
        items = numbered(leases, raw.version)
        await raw.submit(items[:1])
        for wrong in ([items[2]], [items[3], items[1], items[2]]):
            with pytest.raises(grpc.aio.AioRpcError, match="send again from 2") as caught:
                await raw.submit(wrong)
            assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        (answer,) = await raw.submit(items)
        assert answer.acknowledged == 4
        await bench.when(lambda status: status.ledger.accepted == 4, "all four")


async def test_an_older_session_is_fenced_and_an_unknown_one_told_to_join(bench: Bench):
    async with RawActor(bench.address) as raw:
        older = raw.session_id
        await raw.join()
        beat = pb.HeartbeatRequest(session_id=older)
        assert await refused_with(raw.stub.Heartbeat(beat)) is grpc.StatusCode.ABORTED
        beat.session_id = "never seen"
        assert await refused_with(raw.stub.Heartbeat(beat)) is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_lease_that_is_lost_on_its_way_is_granted_again(tmp_path: Path):
    """The actor lives, and does not name it."""
    fleet = dataclasses.replace(QUICK_FLEET, dead_seconds=60.0, progress_timeout_seconds=60.0)
    async with Bench(tmp_path, num_steps=4, fleet=fleet) as bench:
        await bench.start()
        async with RawActor(bench.address) as raw:
            assert await raw.acquire(4)
            async with every(0.2, lambda: asyncio.ensure_future(raw.beat([]))):
                await until(lambda: bench.events("lost"), "the leases to be free again")
            bench.actor("a1")
            await bench.trained()
        bench.check()
