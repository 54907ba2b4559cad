"""A version broadcast to the members of a group on this host: gloo, or NCCL where there are GPUs.

    broadcast_gb_per_s   bytes of the version over the sender's time for it
    verified_gb_per_s    the same until every member has each chunk in place, its digest checked
    sender_s_per_gb      processor time of the sender for a GB; receiver_s_per_gb, of one receiver's process
    pull_gb_per_s        the same over ZeroMQ, each member by itself (--pull)
    forming_seconds      from starting the processes to a group
    beside_ratio         work that a computing process of one thread gets done beside a broadcast every second,
                         over what it gets done without (--beside, on CPUs): the trainer's place

Each is a median. Members on one GPU pass for different hosts, so that NCCL takes sockets between them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def in_turn(manifests: Sequence[Manifest], rounds: int) -> list[Manifest]:
    """Each of them as often, as versions that follow each other."""
    return [
        dataclasses.replace(manifest, version=PolicyVersion(1, number))
        for number, manifest in enumerate([*manifests] * rounds)
    ]


def processor_seconds(pid: int) -> float:
    """That a process has used, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    pids = [group.sender.process.pid, *(member.started[0].pid for member in group.members)]
    sent: list[float] = []
    verified: list[float] = []
    used = [0.0] * len(pids)
    for number, manifest in enumerate(in_turn(manifests, 1 + arguments.rounds)):
        if number == len(manifests):
            # The first of each touched fresh pages.
            used = [processor_seconds(pid) for pid in pids]
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
    warm = slice(len(manifests), None)
    gigabytes = sum(manifest.num_bytes for manifest in manifests) * arguments.rounds / 1e9
    spent = [(processor_seconds(pid) - at) / gigabytes for pid, at in zip(pids, used, strict=True)]
    group.close()
    return {
        "sender_s_per_gb": spent[0],
        "receiver_s_per_gb": max(spent[1:]),
        "broadcast_gb_per_s": statistics.median(sent[warm]) / 1e9,
        "verified_gb_per_s": statistics.median(verified[warm]) / 1e9,
        "forming_seconds": forming,
    }


def measure_pulls(
    manifests: Sequence[Manifest], arguments: argparse.Namespace, threads: ThreadPoolExecutor
) -> dict[str, float]:
    from penstock.weights.fetch import WeightFetcher
    from penstock.weights.manifest import ZeromqMedium
    from penstock.weights.media.zeromq import ZeromqReceiver, ZeromqServer

    server = ZeromqServer("tcp://127.0.0.1:0")
    fetchers = [WeightFetcher([ZeromqReceiver()]) for _ in range(arguments.receivers)]
    rates = []
    for manifest in in_turn(manifests, 1 + arguments.rounds):
        server.add(manifest)
        offered = dataclasses.replace(manifest, media=(ZeromqMedium(endpoint=server.endpoint),))
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
    beside = compute(in_turn(manifests, int(BESIDE_SECONDS))[len(manifests) : int(BESIDE_SECONDS) + 1])
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
    # A fetcher holds two versions, and asks for nothing that it holds.
    num_versions = 3 if arguments.pull else 2
    ring = SegmentRing(name_prefix="penstock-benchmark-broadcast", num_segments=num_versions)
    try:
        manifests = [
            ring.write(PolicyVersion(1, step), tensors(arguments.mib << 20, step))
            for step in range(num_versions)
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
