"""How fast the coordinator takes trajectories in, durably; and what many actors cost it.

First, one stream with 1,024 trajectories (32 messages) unacknowledged. In turn, with the
same client and the same bytes, made before the clock starts:

- durable: a coordinator that checks every array, decides, commits, syncs, acknowledges;
- bare: a grpc.aio stream that hands each message over as bytes, unread, and answers as many
  bytes as the coordinator does;
- parsed: a grpc.aio stream of generated code, which parses each message and answers it.

Then, 1, 10, 100 and 1,000 actors, each with a connection, a session, directives and
heartbeats of its own, that lease 32 slots, submit them as one message, await the
acknowledgement, and begin again as fast as they can; and 100 actors that offer 2,000
trajectories a second together, for the time to an acknowledgement when nothing is saturated.

Last, these again while strangers press: 1,000 connections that stop in the midst of their
first words, and ten that offer 10,000 Joins a second of a protocol that is refused.

    python benchmarks/ingest.py [--json FILE]

Names: durable_per_second, bare_per_second, parsed_per_second (medians of the repeats);
durable_over_bare, durable_over_parsed (ratios of medians); ack_p99_ms, ack_p50_ms (at 2,000
a second); for each number N of actors: per_second_N, busy_ack_p99_ms_N,
cpu_us_per_trajectory_N (of the coordinator's process, with all that its actors ask of it),
rss_mb_N (its peak); and pressed_ack_p99_ms, pressed_over_quiet (its ratio to ack_p99_ms),
strangers_offered_per_second, strangers_answered_per_second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import uvloop
from harness.ingest_servers import (
    ITEMS_PER_MESSAGE,
    Server,
    process,
    serve_bytes,
    serve_coordinator,
    serve_parsed,
)
from harness.report import add_arguments, write
from harness.simulated_actors import SimulatedActor, send
from harness.strangers import strangers

WINDOW = 32
"""Messages: the credits of an actor, 1,024 trajectories."""
NUM_ACTORS = (1, 10, 100, 1000)
OFFERED_PER_SECOND = 2000
OFFERING_ACTORS = 100
SILENT_STRANGERS = 1000
STRANGERS_CALLS_PER_SECOND = 10_000


def throughput(num_trajectories: int, num_tokens: int) -> tuple[float, float, float]:
    """(durable, bare, parsed), trajectories a second."""
    seconds = []
    with (
        tempfile.TemporaryDirectory() as folder,
        process(serve_coordinator, Path(folder), num_trajectories) as server,
    ):
        messages = uvloop.run(_prepare(server, num_trajectories, num_tokens))
        seconds.append(uvloop.run(send(server.address, messages, window=WINDOW)))
    for peer in (serve_bytes, serve_parsed):
        with process(peer) as server:
            seconds.append(uvloop.run(send(server.address, messages, window=WINDOW)))
    durable, bare, parsed = (num_trajectories / each for each in seconds)
    return durable, bare, parsed


async def _prepare(server: Server, num_trajectories: int, num_tokens: int) -> list[bytes]:
    actor = SimulatedActor(server.address, 0, num_tokens)
    await actor.join()
    leases = await actor.lease(num_trajectories)
    messages = [
        actor.message(leases[start : start + ITEMS_PER_MESSAGE]).SerializeToString()
        for start in range(0, len(leases), ITEMS_PER_MESSAGE)
    ]
    await actor.close()
    return messages


def crowd(
    num_actors: int,
    num_messages: int,
    num_tokens: int,
    *,
    seconds_between: float = 0.0,
    is_pressed: bool = False,
) -> Mapping[str, float]:
    """What a number of actors costs, and how it is served. num_messages: of each actor."""
    num_trajectories = num_actors * num_messages * ITEMS_PER_MESSAGE
    pressed = []
    with (
        tempfile.TemporaryDirectory() as folder,
        process(serve_coordinator, Path(folder), num_trajectories) as server,
    ):
        work = _submit_all(server, num_actors, num_messages, num_tokens, seconds_between)
        with contextlib.ExitStack() as stack:
            if is_pressed:
                pressed = stack.enter_context(
                    strangers(
                        server.address,
                        num_silent=SILENT_STRANGERS,
                        calls_per_second=STRANGERS_CALLS_PER_SECOND,
                    )
                )
            seconds, latencies = uvloop.run(work)
        usage = server.usage()
    return {
        "per_second": num_trajectories / seconds,
        "ack_p50_ms": 1e3 * statistics.median(latencies),
        "ack_p99_ms": 1e3 * latencies[int(0.99 * len(latencies))],
        "cpu_us_per_trajectory": 1e6 * usage.cpu_seconds / num_trajectories,
        "rss_mb": usage.peak_rss_mb,
        "strangers_offered_per_second": sum(each.num_offered / each.seconds for each in pressed),
        "strangers_answered_per_second": sum(each.num_answered / each.seconds for each in pressed),
    }


async def _submit_all(
    server: Server, num_actors: int, num_messages: int, num_tokens: int, seconds_between: float
) -> tuple[float, list[float]]:
    """Seconds from the first lease to the last acknowledgement, all having joined before; each message's wait."""
    actors = [SimulatedActor(server.address, number, num_tokens) for number in range(num_actors)]
    async with asyncio.TaskGroup() as background:
        lives = []
        for actor in actors:
            await actor.join()
            # At once: the last of a thousand may join when the first would be dead without a heartbeat.
            lives += [background.create_task(work) for work in (actor.watch(), actor.heartbeat())]
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number, actor in enumerate(actors):
                delay = seconds_between * number / num_actors
                tasks.create_task(
                    _submit(actor, num_messages, seconds_between, delay), name=f"actor {number}"
                )
        seconds = time.perf_counter() - began
        for life in lives:
            life.cancel()
    for actor in actors:
        await actor.close()
    return seconds, sorted(latency for actor in actors for latency in actor.ack_seconds)


async def _submit(actor: SimulatedActor, num_messages: int, seconds_between: float, delay: float) -> None:
    await asyncio.sleep(delay)
    await actor.submit(num_messages, seconds_between=seconds_between)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--num-trajectories", type=int, default=16_384, help="of each repeat, and of each crowd"
    )
    parser.add_argument("--num-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    add_arguments(parser)
    arguments = parser.parse_args()
    num_trajectories, num_tokens = arguments.num_trajectories, arguments.num_tokens
    triples = [throughput(num_trajectories, num_tokens) for _ in range(arguments.repeats)]
    durable, bare, parsed = (statistics.median(column) for column in zip(*triples, strict=True))
    results = {
        "durable_per_second": durable,
        "bare_per_second": bare,
        "parsed_per_second": parsed,
        "durable_over_bare": durable / bare,
        "durable_over_parsed": durable / parsed,
    }
    between = OFFERING_ACTORS * ITEMS_PER_MESSAGE / OFFERED_PER_SECOND
    offered = crowd(OFFERING_ACTORS, 6, num_tokens, seconds_between=between)
    results |= {name: offered[name] for name in ("ack_p50_ms", "ack_p99_ms")}
    for number in NUM_ACTORS:
        num_messages = max(num_trajectories // (number * ITEMS_PER_MESSAGE), 2)
        found = crowd(number, num_messages, num_tokens)
        results |= {
            f"per_second_{number}": found["per_second"],
            f"busy_ack_p99_ms_{number}": found["ack_p99_ms"],
            f"cpu_us_per_trajectory_{number}": found["cpu_us_per_trajectory"],
            f"rss_mb_{number}": found["rss_mb"],
        }
    found = crowd(OFFERING_ACTORS, 6, num_tokens, seconds_between=between, is_pressed=True)
    results |= {
        "pressed_ack_p99_ms": found["ack_p99_ms"],
        "pressed_over_quiet": found["ack_p99_ms"] / results["ack_p99_ms"],
        **{name: found[name] for name in ("strangers_offered_per_second", "strangers_answered_per_second")},
    }
    write(results, arguments)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
