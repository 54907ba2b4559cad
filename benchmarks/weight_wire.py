"""The ZeroMQ medium between two hosts: network namespaces with a veth pair. Needs root.

    rate_over_tcp          bytes a second of the medium over those of a raw TCP socket: both throw away what
                           they read of a dense version; on the bare veth pair, whose rate is that of the
                           processor
    delta_rate_over_tcp    the same for the chunks of 20 deltas
    fetch_over_tcp         the same for a fetch of a dense version: received, copied into place, and every
                           chunk's digest checked
    join_over_bytes_time   time until an actor that is 20 versions late holds the newest one, over the time
                           of the deltas' bytes at the raw socket's rate; on a link of --gbit
    fresh_over_bytes_time  the same for an actor that holds nothing: a snapshot and 20 deltas

Each version differs from the one before it in one bf16 weight of a hundred, mostly by one unit in the
last place, as after a step at a learning rate of 1e-6; `weight_delta.py` measures real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness.report import add_arguments, write
from numpy.typing import NDArray

from penstock.codec import manifest_from_wire, manifest_to_wire
from penstock.memory import collect_rarely, keep_arrays, keep_chunks
from penstock.trajectory import PolicyVersion
from penstock.v1 import weights_pb2
from penstock.weights.catching_up import Chain
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import Blob, HostTensor, Manifest, Medium, ZeromqMedium
from penstock.weights.media.base import Patience
from penstock.weights.media.zeromq import ZeromqReceiver, ZeromqServer
from penstock.weights.segment import SegmentRing
from penstock.weights.version_log import VersionLog

LEARNER, ACTOR = "10.211.0.1", "10.211.0.2"
RAW_PORT = 7099
NUM_LATE = 20
NUM_DENSE = 4
"""Versions that share nothing. A fetcher holds two, so that of these in turn each is fetched whole."""
NUM_PAIRS = 15
SECONDS = 120.0

Words = NDArray[np.uint16]


def moved(words: Words, generator: np.random.Generator) -> Words:
    after = words.copy()
    places = generator.choice(words.size, words.size // 100, replace=False)
    steps = generator.choice(np.array([1, -1, 2, -2], np.int16), places.size, p=[0.46, 0.46, 0.04, 0.04])
    after[places] += steps.view(np.uint16)
    return after


def tensor_of(words: Words) -> HostTensor:
    return HostTensor(name="w", dtype="BF16", shape=(words.size,), data=words.view(np.uint8))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes a second: of the raw socket, the medium, and a fetch."""

    tcp: float
    medium: float
    fetch: float
    tcp_deltas: float
    """Of as many bytes as the deltas have."""
    medium_deltas: float


class Learner:
    """In its namespace: serves versions over ZeroMQ, and the same number of bytes over a raw socket."""

    def __init__(self, num_bytes: int, folder: Path) -> None:
        self._folder = folder
        self._generator = np.random.default_rng(0)
        self._num_bytes = num_bytes
        self._log = VersionLog(name_prefix="penstock-wire", snapshot_every=1000)
        self._ring = SegmentRing(name_prefix="penstock-wire-dense", num_segments=NUM_DENSE)
        self._server = ZeromqServer(f"tcp://{LEARNER}:0")
        self._dense_server = ZeromqServer(f"tcp://{LEARNER}:0", num_versions=NUM_DENSE)

    def run(self) -> None:
        """Until the other end of standard input is closed."""
        try:
            self._publish()
            sys.stdin.read()
        finally:
            for each in (self._server, self._dense_server, self._log, self._ring):
                each.close()

    def _publish(self) -> None:
        threading.Thread(target=self._serve_raw, daemon=True).start()
        for number in range(NUM_DENSE):
            written = self._ring.write(PolicyVersion(1, number), [tensor_of(self._random())])
            self._offer(f"dense-{number}", written, self._dense_server)
        words = self._random()
        for step in range(NUM_LATE + 1):
            written = self._log.write(PolicyVersion(2, step), [tensor_of(words)], with_delta=True)
            self._offer("late" if step else "base", written, self._server)
            words = moved(words, self._generator)
        (self._folder / "ready").touch()

    def _random(self) -> Words:
        return self._generator.integers(0, 1 << 16, self._num_bytes // 2, dtype=np.uint16)

    def _offer(self, name: str, written: Manifest, server: ZeromqServer) -> None:
        server.add(written)
        offered = dataclasses.replace(written, media=(ZeromqMedium(endpoint=server.endpoint),))
        (self._folder / name).write_bytes(manifest_to_wire(offered).SerializeToString())

    def _serve_raw(self) -> None:
        # Other bytes than zeros, which the system keeps in one page that never leaves the cache.
        data = memoryview(self._random().view(np.uint8))
        with socket.create_server((LEARNER, RAW_PORT)) as listener:
            while True:
                peer, _ = listener.accept()
                with peer:
                    (num_bytes,) = struct.unpack("<Q", peer.recv(8, socket.MSG_WAITALL))
                    peer.sendall(data[:num_bytes])


class Actor:
    """In the other namespace: fetches, and reads the raw socket."""

    def __init__(self, num_bytes: int, folder: Path) -> None:
        self._num_bytes = num_bytes
        self._folder = folder

    def rates(self) -> Rates:
        """Medians, in bytes a second, of what was measured in turn; the first two fetches only touch pages."""
        receiver = ZeromqReceiver()
        fetcher = WeightFetcher([receiver])
        versions = itertools.cycle(f"dense-{number}" for number in range(NUM_DENSE))
        dense, late = self.manifest("dense-0"), self.manifest("late")
        chain = Chain.of(late.deltas)
        seconds = [
            (
                self.read_raw(self._num_bytes),
                self._receive(receiver, dense, dense.media[0]),
                self._fetch(fetcher, next(versions)),
                self.read_raw(chain.num_bytes),
                self._receive(receiver, chain, late.media[0]),
            )
            for _ in range(2 + NUM_PAIRS)
        ]
        fetcher.close()
        raw, medium, fetch, raw_deltas, medium_deltas = (
            statistics.median(column) for column in zip(*seconds[2:], strict=True)
        )
        return Rates(
            tcp=self._num_bytes / raw,
            medium=self._num_bytes / medium,
            fetch=self._num_bytes / fetch,
            tcp_deltas=chain.num_bytes / raw_deltas,
            medium_deltas=chain.num_bytes / medium_deltas,
        )

    def _receive(self, receiver: ZeromqReceiver, blob: Blob, medium: Medium) -> float:
        patience = Patience(deadline=time.monotonic() + SECONDS, abandoned=threading.Event())
        began = time.perf_counter()
        indices = range(len(blob.chunk_digests))
        num_bytes = sum(data.size for _, data in receiver.chunks(blob, medium, indices, patience))
        assert num_bytes == blob.num_bytes
        return time.perf_counter() - began

    def join(self, *, holds: str | None) -> float:
        """Seconds until the newest version is here."""
        fetcher = WeightFetcher([ZeromqReceiver()])
        if holds is not None:
            for name in ("dense-0", holds):
                self._fetch(fetcher, name)
        taken = self._fetch(fetcher, "late")
        fetcher.close()
        return taken

    def read_raw(self, num_bytes: int) -> float:
        buffer, left = memoryview(bytearray(1 << 20)), num_bytes
        began = time.perf_counter()
        with socket.create_connection((LEARNER, RAW_PORT)) as peer:
            peer.sendall(struct.pack("<Q", num_bytes))
            while left:
                left -= peer.recv_into(buffer)
        return time.perf_counter() - began

    def manifest(self, name: str) -> Manifest:
        return manifest_from_wire(weights_pb2.WeightManifest.FromString((self._folder / name).read_bytes()))

    def _fetch(self, fetcher: WeightFetcher, name: str) -> float:
        manifest = self.manifest(name)
        began = time.perf_counter()
        fetcher.fetch(manifest, timeout_seconds=SECONDS)
        return time.perf_counter() - began


def measure(num_bytes: int, folder: Path, repeats: int, gbit: float) -> dict[str, float]:
    """In the actor's namespace."""
    actor = Actor(num_bytes, folder)
    rates = actor.rates()
    actor.join(holds="base")  # numba loads, once a process
    limit(gbit)
    rate = num_bytes / statistics.median(actor.read_raw(num_bytes) for _ in range(3))
    newest = actor.manifest("late")
    deltas = sum(delta.num_bytes for delta in newest.deltas)
    late = statistics.median(actor.join(holds="base") for _ in range(repeats))
    fresh = statistics.median(actor.join(holds=None) for _ in range(repeats))
    return {
        "rate_over_tcp": rates.medium / rates.tcp,
        "delta_rate_over_tcp": rates.medium_deltas / rates.tcp_deltas,
        "fetch_over_tcp": rates.fetch / rates.tcp,
        "join_over_bytes_time": late / (deltas / rate),
        "fresh_over_bytes_time": fresh / ((deltas + num_bytes) / rate),
        "zeromq_gb_per_s": rates.medium / 1e9,
        "fetch_gb_per_s": rates.fetch / 1e9,
        "tcp_gb_per_s": rates.tcp / 1e9,
        "dense_over_deltas_bytes": num_bytes * NUM_LATE / deltas,
        "link_gbit_per_s": rate * 8 / 1e9,
    }


def limit(gbit: float) -> None:
    """Holds the learner's end of the link to a rate, from now on."""
    rate = ["rate", f"{gbit}gbit", "burst", "4mb", "latency", "50ms"]
    name = os.environ["WIRE_LEARNER"]
    run("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "wire0", "root", "tbf", *rate)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces that see each other and nothing else."""
    learner, actor = (f"wire-{role}-{os.getpid()}" for role in ("learner", "actor"))
    try:
        for name in (learner, actor):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", learner, "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
        run("ip", "-n", learner, "link", "set", "wire1", "netns", actor)
        for name, device, address in ((learner, "wire0", LEARNER), (actor, "wire1", ACTOR)):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", device)
            run("ip", "-n", name, "link", "set", device, "up")
        yield learner, actor
    finally:
        for name in (learner, actor):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"weight_wire.py needs root, ip and tc: {' '.join(command)}: {done.stderr.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes", type=int, default=420, help="of a version: 210M parameters in bfloat16"
    )
    parser.add_argument("--gbit", type=float, default=1.0, help="rate of the link on which actors join")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--role", choices=("learner", "actor"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args()
    num_bytes = arguments.megabytes << 20
    # As an exception it ends the namespaces and the segments too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments.role == "learner":
        # As the coordinator's process does.
        keep_arrays()
        collect_rarely()
        Learner(num_bytes, arguments.folder).run()
    elif arguments.role == "actor":
        # As an actor's process does.
        keep_chunks()
        collect_rarely()
        write(measure(num_bytes, arguments.folder, arguments.repeats, arguments.gbit), arguments)
    elif os.geteuid() != 0:
        print("skipped: network namespaces need root")
    else:
        with two_hosts() as hosts, tempfile.TemporaryDirectory() as folder:
            start_both(*hosts, Path(folder))


def start_both(learner: str, actor: str, folder: Path) -> None:
    again = [sys.executable, *sys.argv, "--folder", str(folder), "--role"]
    serving = subprocess.Popen(
        ["ip", "netns", "exec", learner, *again, "learner"], stdin=subprocess.PIPE, text=True
    )
    assert serving.stdin is not None
    try:
        deadline = time.monotonic() + SECONDS
        while not (folder / "ready").exists():
            if serving.poll() is not None or time.monotonic() > deadline:
                sys.exit("the learner's end did not get ready")
            time.sleep(0.1)
        environment = os.environ | {"WIRE_LEARNER": learner}
        subprocess.run(["ip", "netns", "exec", actor, *again, "actor"], check=True, env=environment)
    finally:
        serving.stdin.close()
        serving.wait(timeout=30)


if __name__ == "__main__":
    main()
