"""The chunk server under bad clients, and the receiver under bad servers."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from penstock.errors import ConfigError, WeightTransferError
from penstock.trajectory import PolicyVersion
from penstock.v1 import weights_pb2
from penstock.weights.fetch import WeightFetcher
from penstock.weights.manifest import Manifest, ZeromqMedium
from penstock.weights.media import zeromq
from penstock.weights.media.base import Patience
from penstock.weights.media.shared_memory import SharedMemoryReceiver
from penstock.weights.media.zeromq import ZeromqReceiver, ZeromqServer
from penstock.weights.segment import SegmentRing
from tests.weight_fixtures import CHUNK, assert_holds, tensors

SECONDS = 30


@pytest.fixture
def ring() -> Iterator[SegmentRing]:
    ring = SegmentRing(name_prefix="penstock-test-zeromq", num_segments=6, chunk_bytes=CHUNK)
    yield ring
    ring.close()


@pytest.fixture
def server() -> Iterator[ZeromqServer]:
    server = ZeromqServer("tcp://127.0.0.1:0", num_versions=2)
    yield server
    server.close()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def over(manifest: Manifest, endpoint: str) -> Manifest:
    return dataclasses.replace(manifest, media=(ZeromqMedium(endpoint=endpoint),))


def fetch(manifest: Manifest, receiver: ZeromqReceiver | None = None) -> object:
    fetcher = WeightFetcher([receiver or ZeromqReceiver()])
    try:
        return fetcher.fetch(manifest, timeout_seconds=SECONDS)
    finally:
        fetcher.close()


def request_for(manifest: Manifest, **changes: object) -> bytes:
    fields = {
        "digest": manifest.chunk_digests[0],
        "source": bytes.fromhex(manifest.digest),
        "index": 0,
    }
    return weights_pb2.ChunkRequest(**(fields | changes)).SerializeToString()  # type: ignore[arg-type]


def test_a_chunk_is_served(
    ring: SegmentRing, server: ZeromqServer, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    server.add(manifest)
    client = context.socket(zmq.DEALER)
    client.connect(server.endpoint)
    client.send(request_for(manifest, index=1, digest=manifest.chunk_digests[1]))
    assert client.poll(SECONDS * 1000)
    header, chunk = client.recv_multipart()
    assert weights_pb2.ChunkHeader.FromString(header) == weights_pb2.ChunkHeader(
        source=bytes.fromhex(manifest.digest), index=1, found=True
    )
    assert len(chunk) == CHUNK


def test_chunks_that_are_asked_for_together_are_answered_together(
    ring: SegmentRing, server: ZeromqServer, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    server.add(manifest)
    chunks = _chunks_of(manifest)
    client = context.socket(zmq.DEALER)
    client.connect(server.endpoint)
    client.send_multipart(
        [
            request_for(manifest, index=1, digest=manifest.chunk_digests[1]),
            request_for(manifest, index=10_000),
            request_for(manifest),
        ]
    )
    assert client.poll(SECONDS * 1000)
    answer = client.recv_multipart()
    headers = [weights_pb2.ChunkHeader.FromString(header) for header in answer[::2]]
    assert [(header.index, header.found) for header in headers] == [(1, True), (10_000, False), (0, True)]
    assert answer[1::2] == [chunks[1], b"", chunks[0]]
    stats = server.stats()
    assert (stats.num_requests, stats.num_chunks, stats.num_missing) == (3, 2, 1)


def test_more_than_a_message_holds_is_not_answered(
    ring: SegmentRing,
    server: ZeromqServer,
    context: zmq.Context[zmq.Socket[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for one chunk, however large: nothing smaller can be asked for."""
    monkeypatch.setattr(zeromq, "MESSAGE_BYTES", CHUNK - 1)
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    server.add(manifest)
    client = context.socket(zmq.DEALER)
    client.connect(server.endpoint)
    client.send_multipart([request_for(manifest), request_for(manifest)])
    client.send(request_for(manifest))
    assert client.poll(SECONDS * 1000)
    assert len(client.recv_multipart()) == 2
    assert server.stats().num_malformed == 1


def test_malformed_requests_are_counted_and_dropped(
    ring: SegmentRing, server: ZeromqServer, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    server.add(manifest)
    client = context.socket(zmq.DEALER)
    client.connect(server.endpoint)
    bad = [
        [b""],
        [b"\xff" * 50],
        [b"a", b"b"],
        [request_for(manifest, digest=b"short")],
        [request_for(manifest, source=b"")],
        [request_for(manifest), request_for(manifest, source=b"")],
        [request_for(manifest)] * (zeromq.MESSAGE_CHUNKS + 1),
    ]
    for frames in bad:
        client.send_multipart(frames)
    client.send(request_for(manifest))
    assert client.poll(SECONDS * 1000)
    client.recv_multipart()
    stats = server.stats()
    assert (stats.num_malformed, stats.num_requests, stats.num_chunks) == (len(bad), 1, 1)


def test_what_is_not_held_is_answered_and_counted(
    ring: SegmentRing, server: ZeromqServer, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    server.add(manifest)
    client = context.socket(zmq.DEALER)
    client.connect(server.endpoint)
    wrong = [
        request_for(manifest, index=10_000),
        request_for(manifest, digest=bytes(32)),
        request_for(manifest, source=bytes(32)),
    ]
    for request in wrong:
        client.send(request)
        assert client.poll(SECONDS * 1000)
        header, chunk = client.recv_multipart()
        assert not weights_pb2.ChunkHeader.FromString(header).found
        assert chunk == b""
    assert server.stats().num_missing == len(wrong)


def test_an_oversized_request_costs_only_its_sender(
    ring: SegmentRing, server: ZeromqServer, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    manifest = over(_added(server, ring, 0), server.endpoint)
    client = context.socket(zmq.DEALER)
    client.connect(server.endpoint)
    client.send(bytes(1 << 20))
    fetch(manifest)
    assert server.stats().num_malformed == 0


def test_a_client_that_never_reads_does_not_stop_the_others(
    ring: SegmentRing, server: ZeromqServer, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    written = _added(server, ring, 0)
    greedy = context.socket(zmq.DEALER)
    greedy.setsockopt(zmq.RCVHWM, 1)
    greedy.connect(server.endpoint)
    for _ in range(500):
        greedy.send(request_for(written))
    fetch(over(written, server.endpoint))


def test_only_the_newest_versions_are_kept(ring: SegmentRing, server: ZeromqServer) -> None:
    manifests = [over(_added(server, ring, step), server.endpoint) for step in range(3)]
    with pytest.raises(WeightTransferError, match="no more"):
        fetch(manifests[0])
    fetch(manifests[1])
    fetch(manifests[2])
    server.remove(PolicyVersion(1, 2))
    with pytest.raises(WeightTransferError, match="no more"):
        fetch(manifests[2])


def test_a_version_is_served_after_its_trainer_is_gone(ring: SegmentRing, server: ZeromqServer) -> None:
    manifest = over(_added(server, ring, 0), server.endpoint)
    ring.close()
    assert_holds(fetch(manifest), tensors(seed=0))  # type: ignore[arg-type]


def test_a_version_that_cannot_be_mapped_is_refused(ring: SegmentRing, server: ZeromqServer) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    for step in range(1, 7):
        ring.write(PolicyVersion(1, step), tensors())
    with pytest.raises(WeightTransferError, match="any more"):
        server.add(manifest)
    with pytest.raises(WeightTransferError, match="no shared memory"):
        server.add(over(manifest, server.endpoint))


def test_a_port_in_use_is_a_configuration_error(server: ZeromqServer) -> None:
    for bad in (server.endpoint, "127.0.0.1:0", "tcp://nowhere"):
        with pytest.raises(ConfigError, match="cannot serve weights"):
            ZeromqServer(bad)


def test_an_endpoint_that_is_not_tcp_is_refused(ring: SegmentRing) -> None:
    written = ring.write(PolicyVersion(1, 0), tensors())
    for bad in ("ipc:///tmp/x", "inproc://x", "", "tcp://127.0.0.1:notaport"):
        with pytest.raises(WeightTransferError, match=r"tcp|connect"):
            fetch(over(written, bad))


def test_a_dead_server_ends_in_an_error(ring: SegmentRing) -> None:
    server = ZeromqServer("tcp://127.0.0.1:0")
    manifest = over(_added(server, ring, 0), server.endpoint)
    server.close()
    server.close()
    with pytest.raises(WeightTransferError, match="no chunk in"):
        fetch(manifest, ZeromqReceiver(progress_seconds=0.2))


def test_transfers_from_one_server_share_a_connection_until_one_fails(
    ring: SegmentRing, server: ZeromqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was on its way when it failed is nobody's."""
    opened: list[str] = []
    dealer = zeromq._dealer

    def counted(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
        opened.append(endpoint)
        return dealer(context, endpoint)

    monkeypatch.setattr(zeromq, "_dealer", counted)
    fetcher = WeightFetcher([ZeromqReceiver()])
    manifests = [over(_added(server, ring, step), server.endpoint) for step in range(3)]
    for step in (1, 2):
        assert_holds(fetcher.fetch(manifests[step], timeout_seconds=SECONDS), tensors(seed=step))
    assert opened == [server.endpoint]
    with pytest.raises(WeightTransferError, match="no more"):
        fetcher.fetch(manifests[0], timeout_seconds=SECONDS)
    assert opened == [server.endpoint]
    newer = over(_added(server, ring, 3), server.endpoint)
    assert_holds(fetcher.fetch(newer, timeout_seconds=SECONDS), tensors(seed=3))
    assert opened == [server.endpoint] * 2
    other = ZeromqServer("tcp://127.0.0.1:0")
    elsewhere = over(_added(other, ring, 4), other.endpoint)
    assert_holds(fetcher.fetch(elsewhere, timeout_seconds=SECONDS), tensors(seed=4))
    assert opened == [server.endpoint] * 2 + [other.endpoint]
    other.close()
    fetcher.close()


class FakeServer:
    """Answers each request as `answer(number, request)` says: frames, or None for silence."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        answer: Callable[[int, weights_pb2.ChunkRequest], list[bytes] | None],
    ) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind("tcp://127.0.0.1:0")
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._answer = answer
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        number = 0
        while not self._closing.is_set():
            if self._socket.poll(20):
                peer, *requests = self._socket.recv_multipart()
                for request in requests:
                    frames = self._answer(number, weights_pb2.ChunkRequest.FromString(request))
                    number += 1
                    if frames is not None:
                        self._socket.send_multipart([peer, *frames])
        self._socket.close()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()


def test_requests_without_an_answer_are_sent_again(
    ring: SegmentRing, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    chunks = _chunks_of(manifest)
    server = FakeServer(
        context, lambda number, request: None if number < 5 else _answer(request, chunks[request.index])
    )
    receiver = ZeromqReceiver(resend_seconds=0.05)
    assert_holds(fetch(over(manifest, server.endpoint), receiver), tensors())  # type: ignore[arg-type]
    server.close()


def test_answers_that_come_twice_or_unasked_are_ignored(
    ring: SegmentRing, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    chunks = _chunks_of(manifest)

    def answer(number: int, request: weights_pb2.ChunkRequest) -> list[bytes]:
        index = 0 if number == 1 else request.index
        return _answer(weights_pb2.ChunkRequest(source=request.source, index=index), chunks[index])

    server = FakeServer(context, answer)
    receiver = ZeromqReceiver(resend_seconds=0.05)
    assert_holds(fetch(over(manifest, server.endpoint), receiver), tensors())  # type: ignore[arg-type]
    server.close()


@pytest.mark.parametrize(
    "frames", [[b"\xff\xff", b"x"], [b"x"], [b"", b"", b""], [b"", b"not the chunk"]], ids=str
)
def test_a_server_that_answers_garbage_is_an_error(
    ring: SegmentRing, context: zmq.Context[zmq.Socket[bytes]], frames: list[bytes]
) -> None:
    manifest = ring.write(PolicyVersion(1, 0), tensors())
    server = FakeServer(context, lambda number, request: frames)
    with pytest.raises(WeightTransferError):
        fetch(over(manifest, server.endpoint), ZeromqReceiver(progress_seconds=1.0))
    server.close()


@pytest.mark.parametrize(
    ("credit_bytes", "expected"), [(zeromq.CREDIT_BYTES, 64), (256 * 5 + 100, 5), (10, 1)]
)
def test_chunks_are_asked_for_a_bounded_number_at_a_time(
    context: zmq.Context[zmq.Socket[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    credit_bytes: int,
    expected: int,
) -> None:
    monkeypatch.setattr(zeromq, "CREDIT_BYTES", credit_bytes)
    small = SegmentRing(name_prefix="penstock-test-zeromq-small", chunk_bytes=256)
    manifest = small.write(PolicyVersion(1, 0), tensors())
    seen: list[int] = []

    def note(number: int, request: weights_pb2.ChunkRequest) -> None:
        seen.append(request.index)

    server = FakeServer(context, note)
    with pytest.raises(WeightTransferError, match="no chunk in"):
        fetch(
            over(manifest, server.endpoint),
            ZeromqReceiver(resend_seconds=10.0, progress_seconds=0.3),
        )
    server.close()
    small.close()
    assert len(manifest.chunk_digests) > 100
    assert seen == list(range(expected))


def _added(server: ZeromqServer, ring: SegmentRing, step: int) -> Manifest:
    manifest = ring.write(PolicyVersion(1, step), tensors(seed=step))
    server.add(manifest)
    return manifest


def _answer(request: weights_pb2.ChunkRequest, chunk: bytes) -> list[bytes]:
    header = weights_pb2.ChunkHeader(source=request.source, index=request.index, found=True)
    return [header.SerializeToString(), chunk]


def _chunks_of(manifest: Manifest) -> list[bytes]:
    patience = Patience(deadline=time.monotonic() + SECONDS, abandoned=threading.Event())
    receiver = SharedMemoryReceiver()
    indices = range(len(manifest.chunk_digests))
    return [
        data.tobytes() for _, data in receiver.chunks(manifest, manifest.media[0], list(indices), patience)
    ]


def test_a_server_that_listens_on_every_address_is_reached_where_its_learner_is(ring: SegmentRing) -> None:
    """The test's own listens on one that nobody finds who takes the endpoint by its word."""
    server = ZeromqServer("tcp://127.0.0.2:0")
    try:
        manifest = ring.write(PolicyVersion(1, 0), tensors())
        server.add(manifest)
        port = server.endpoint.rpartition(":")[2]
        for everywhere in ("0.0.0.0", "[::]"):
            announced = over(manifest, f"tcp://{everywhere}:{port}")
            fetch(announced, ZeromqReceiver(host="127.0.0.2", progress_seconds=5.0))
            with pytest.raises(WeightTransferError):
                fetch(announced, ZeromqReceiver(host="127.0.0.3", progress_seconds=0.5))
    finally:
        server.close()
