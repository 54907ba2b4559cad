"""A version broadcast to the members of a group on this host: gloo, or NCCL where there are GPUs.

    broadcast_gb_per_s   bytes of the version over the sender's time for it
    verified_gb_per_s    the same until every member has each chunk in place, its digest checked
    pull_gb_per_s        the same over ZeroMQ, each member by itself (--pull)
    forming_seconds      from starting the processes to a group
    beside_ratio         work that a computing process of one thread gets done beside a broadcast every second,
                         over what it gets done without (--beside, on CPUs): the trainer's place

Each is a median. Members on one GPU pass for different hosts, so that NCCL takes sockets between them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from harness.report import add_arguments, write

from penstock.broadcast.words import Backend, EventKind
from penstock.trajectory import PolicyVersion
from penstock.weights.buffer import ChunkBuffer
from penstock.weights.manifest import HostTensor, Manifest
from penstock.weights.segment import SegmentRing
from tests.broadcast_groups import Group, new_buffer, take

SECONDS = 60.0


def tensors(num_bytes: int, step: int) -> list[HostTensor]:
    data = np.random.default_rng(step).integers(0, 256, size=num_bytes, dtype=np.uint8)
    return [HostTensor(name="weights", dtype="BF16", shape=(num_bytes // 2,), data=data)]


def measure_broadcasts(
    manifests: Sequence[Manifest], arguments: argparse.Namespace, threads: ThreadPoolExecutor
) -> dict[str, float]:
    started = time.monotonic()
    group = Group(
        arguments.receivers,
        backend=Backend(arguments.backend),
        device="cuda" if arguments.backend == Backend.NCCL else "cpu",
        piece_bytes=arguments.piece_mib << 20,
    )
    forming = time.monotonic() - started
    buffers = [ChunkBuffer() for _ in group.receivers]
    sent: list[float] = []
    verified: list[float] = []
    for manifest in manifests * (1 + arguments.rounds):
        for buffer in buffers:
            new_buffer(manifest, buffer)
        started = time.monotonic()
        group.sender.send(manifest)
        taking = [
            threads.submit(take, receiver, manifest, buffer)
            for receiver, buffer in zip(group.receivers, buffers, strict=True)
        ]
        event = group.sender.next(EventKind.SENT, EventKind.FAILED)
        assert event.kind == EventKind.SENT, event
        assert not any(taken.result(timeout=SECONDS).missing() for taken in taking)
        sent.append(manifest.num_bytes / event.seconds)
        verified.append(manifest.num_bytes / (time.monotonic() - started))
    group.close()
    # The first of each touches fresh pages.
    warm = slice(len(manifests), None)
    return {
        "broadcast_gb_per_s": statistics.median(sent[warm]) / 1e9,
        "verified_gb_per_s": statistics.median(verified[warm]) / 1e9,
        "forming_seconds": forming,
    }


def measure_pulls(
    manifests: Sequence[Manifest], arguments: argparse.Namespace, threads: ThreadPoolExecutor
) -> dict[str, float]:
    from dataclasses import replace

    from penstock.weights.fetch import WeightFetcher
    from penstock.weights.manifest import ZeromqMedium
    from penstock.weights.media.zeromq import ZeromqReceiver, ZeromqServer

    server = ZeromqServer("tcp://127.0.0.1:0")
    fetchers = [WeightFetcher([ZeromqReceiver()]) for _ in range(arguments.receivers)]
    rates = []
    for manifest in manifests * (1 + arguments.rounds):
        server.add(manifest)
        offered = replace(manifest, media=(ZeromqMedium(endpoint=server.endpoint),))
        started = time.monotonic()
        pulling = [threads.submit(fetcher.fetch, offered, timeout_seconds=SECONDS) for fetcher in fetchers]
        for pulled in pulling:
            pulled.result(timeout=SECONDS)
        rates.append(manifest.num_bytes / (time.monotonic() - started))
    for fetcher in fetchers:
        fetcher.close()
    server.close()
    return {"pull_gb_per_s": statistics.median(rates[len(manifests) :]) / 1e9}


COMPUTE = """
import sys, time
import numpy as np

matrix = np.random.default_rng(0).standard_normal((256, 256))
for line in sys.stdin:
    until, count = time.monotonic() + float(line), 0
    while time.monotonic() < until:
        matrix @ matrix
        count += 1
    print(count, flush=True)
"""
BESIDE_SECONDS = 8.0


def measure_beside(
    manifests: Sequence[Manifest], arguments: argparse.Namespace, threads: ThreadPoolExecutor
) -> dict[str, float]:
    """Twice without, around once with."""
    group = Group(arguments.receivers, piece_bytes=arguments.piece_mib << 20)
    computing = subprocess.Popen(
        [sys.executable, "-c", COMPUTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def compute(versions: Sequence[Manifest]) -> int:
        assert computing.stdin is not None
        assert computing.stdout is not None
        computing.stdin.write(f"{BESIDE_SECONDS}\n")
        computing.stdin.flush()
        for manifest in versions:
            group.sender.send(manifest)
            taking = [threads.submit(take, receiver, manifest) for receiver in group.receivers]
            assert not any(taken.result(timeout=SECONDS).missing() for taken in taking)
            group.sender.next(EventKind.SENT)
            time.sleep(1.0)
        return int(computing.stdout.readline())

    compute(manifests)
    before = compute(())
    beside = compute([manifests[number % 2] for number in range(int(BESIDE_SECONDS) - 2)])
    after = compute(())
    computing.kill()
    group.close()
    return {"beside_ratio": beside / ((before + after) / 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=list(Backend), default="gloo")
    parser.add_argument("--mib", type=int, default=256, help="of a version")
    parser.add_argument("--receivers", type=int, default=1)
    parser.add_argument("--piece-mib", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pull", action="store_true", help="measure ZeroMQ too")
    parser.add_argument("--beside", action="store_true", help="measure what it costs others (gloo)")
    add_arguments(parser)
    arguments = parser.parse_args()
    ring = SegmentRing(name_prefix="penstock-benchmark-broadcast", num_segments=2)
    try:
        manifests = [
            ring.write(PolicyVersion(1, step), tensors(arguments.mib << 20, step)) for step in range(2)
        ]
        with ThreadPoolExecutor(arguments.receivers) as threads:
            results = measure_broadcasts(manifests, arguments, threads)
            if arguments.pull:
                results |= measure_pulls(manifests, arguments, threads)
            if arguments.beside:
                results |= measure_beside(manifests, arguments, threads)
    finally:
        ring.close()
    write(results, arguments)


if __name__ == "__main__":
    main()
