"""Chunks over ZeroMQ, for receivers on other hosts.

    receiver (DEALER)                 server (ROUTER, a thread of the coordinator)
      ChunkRequest, ...     ->
      up to CREDIT_BYTES    ->
                            <-        ChunkHeader, bytes, ...      one message answers one

The receiver's credits are all the flow control there is: the server never has more
than a few chunks queued for a receiver, and drops what a greedier one asks for. Of a small
chunk's time, waking the threads on its way is most: several are asked for in one message.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import zmq
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from penstock.errors import ConfigError, WeightTransferError
from penstock.rpc import join_address
from penstock.trajectory import PolicyVersion
from penstock.v1 import weights_pb2
from penstock.weights.manifest import (
    DIGEST_BYTES,
    MAX_CHUNK_BYTES,
    AdapterUpdate,
    Blob,
    Delta,
    Manifest,
    Medium,
    SharedMemoryMedium,
    Snapshot,
    ZeromqMedium,
)
from penstock.weights.media.base import Chunk, Patience
from penstock.weights.segment import Segment, open_segment

CREDIT_BYTES = 8 * 1024 * 1024
"""Of chunks that a receiver has asked for and does not have. One chunk may be more."""
MAX_REQUESTS = 64
"""Of them, however small."""
MESSAGE_BYTES = 512 * 1024
"""Of the chunks of one message, unless it is one chunk."""
MESSAGE_CHUNKS = 16

_log = logging.getLogger(__name__)

# ZeroMQ counts what was read in steps of half a queue: one of MAX_REQUESTS alone would drop answers.
_QUEUE_MESSAGES = 2 * MAX_REQUESTS
_POLL_MILLISECONDS = 100
_MAX_REQUEST_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """Counts since the server started."""

    num_requests: int
    num_chunks: int
    """Chunks sent."""
    num_bytes: int
    """Bytes of chunks sent."""
    num_missing: int
    """Requests for a version or chunk that is not held."""
    num_malformed: int
    """Messages that ask for nothing, or for too much, and were dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A version, snapshot, delta or adapter, where it lies on this host."""

    blob: Blob
    nonce: str
    segment: Segment

    def has(self, request: weights_pb2.ChunkRequest) -> bool:
        digests = self.blob.chunk_digests
        return (
            request.index < len(digests)
            and digests[request.index] == request.digest
            and self.segment.nonce == self.nonce
        )


class ZeromqServer:
    """Serves the newest versions and what leads to them from the trainer's segments, in a thread of its own."""

    def __init__(self, bind: str, *, num_versions: int = 4) -> None:
        """Listens on `bind`, "tcp://HOST:PORT"; port 0 takes a free one. Raises ConfigError."""
        self._num_versions = num_versions
        self._versions: dict[PolicyVersion, _Held] = {}
        self._ways: dict[str, _Held] = {}
        self._held: dict[str, _Held] = {}
        """By the blob's digest: `_versions` and `_ways`. Replaced as a whole."""
        self._closing = threading.Event()
        self._num_requests = self._num_chunks = self._num_bytes = 0
        self._num_missing = self._num_malformed = 0
        self._context = zmq.Context()
        self._socket = _router(self._context, bind)
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._serve, name="weights-zeromq", daemon=True)
        self._thread.start()

    def add(self, manifest: Manifest) -> None:
        """Serves a version and what leads to it; forgets the oldest beyond `num_versions`.

        Raises WeightTransferError if the version's segment is not on this host or was overwritten.
        """
        medium = next((each for each in manifest.media if isinstance(each, SharedMemoryMedium)), None)
        if medium is None:
            raise WeightTransferError(f"version {manifest.version} has no shared memory to serve it from")
        self._versions[manifest.version] = _hold(manifest, medium)
        for version in sorted(self._versions)[: -self._num_versions]:
            del self._versions[version]
        snapshots = () if manifest.snapshot is None else (manifest.snapshot,)
        adapter = () if manifest.adapter is None else (manifest.adapter.base, manifest.adapter)
        self._ways = dict(self._ways_to(*snapshots, *manifest.deltas, *adapter))
        self._replace_held()

    def _ways_to(self, *blobs: Snapshot | Delta | AdapterUpdate) -> Iterator[tuple[str, _Held]]:
        for blob in blobs:
            known = self._ways.get(blob.digest)
            if known is not None and known.nonce == blob.segment.nonce:
                yield blob.digest, known
                continue
            try:
                yield blob.digest, _hold(blob, blob.segment)
            except WeightTransferError as error:
                _log.warning(
                    "late actors cannot take the way over version %s, but the whole: %s", blob.version, error
                )

    def _replace_held(self) -> None:
        self._held = {held.blob.digest: held for held in self._versions.values()} | self._ways

    def remove(self, version: PolicyVersion) -> None:
        """Stops serving a version; receivers are told that it is not held."""
        self._versions.pop(version, None)
        self._ways = {}
        self._replace_held()

    def stats(self) -> ServerStats:
        return ServerStats(
            num_requests=self._num_requests,
            num_chunks=self._num_chunks,
            num_bytes=self._num_bytes,
            num_missing=self._num_missing,
            num_malformed=self._num_malformed,
        )

    def close(self) -> None:
        """Stops serving. May be called twice."""
        self._closing.set()
        self._thread.join()
        self._versions, self._ways, self._held = {}, {}, {}

    def _serve(self) -> None:
        try:
            while not self._closing.is_set():
                if self._socket.poll(_POLL_MILLISECONDS, zmq.POLLIN):
                    self._answer(self._socket.recv_multipart())
        finally:
            self._socket.close()
            self._context.term()

    def _answer(self, frames: list[bytes]) -> None:
        requests = _parse_requests(frames[1:])
        found = [self._find(request) for request in requests]
        sizes = [0 if chunk is None else chunk.size for chunk in found]
        if not requests or (len(sizes) > 1 and sum(sizes) > MESSAGE_BYTES):
            self._num_malformed += 1
            return
        answer: list[bytes | memoryview] = [frames[0]]
        for request, chunk in zip(requests, found, strict=True):
            header = weights_pb2.ChunkHeader(
                source=request.source, index=request.index, found=chunk is not None
            )
            answer += (header.SerializeToString(), b"" if chunk is None else chunk.data)
        # Sent from the mapped segment. Should the trainer overwrite it meanwhile, the receiver
        # sees another digest and asks again, and then the nonce tells us that it is gone.
        self._num_requests += len(requests)
        self._num_missing += sum(chunk is None for chunk in found)
        self._num_chunks += sum(chunk is not None for chunk in found)
        self._num_bytes += sum(sizes)
        # Frames below 64 KiB (zmq.COPY_THRESHOLD) are copied all the same, which is quicker than to agree with
        # ZeroMQ's threads on when their memory is free again; that for a larger copy is found and zeroed each time.
        self._socket.send_multipart(answer, copy=False)

    def _find(self, request: weights_pb2.ChunkRequest) -> NDArray[np.uint8] | None:
        held = self._held.get(request.source.hex())
        if held is None or not held.has(request):
            return None
        return held.segment.payload[held.blob.chunk(request.index)]


class ZeromqReceiver:
    """Asks a server for chunks, a bounded number at a time."""

    def __init__(
        self, *, host: str = "127.0.0.1", resend_seconds: float = 2.0, progress_seconds: float = 10.0
    ) -> None:
        """
        host: of a server that listens on every address, and so cannot say where it is reached.
        resend_seconds: requests without an answer for this long are sent again.
        progress_seconds: the transfer fails when no chunk came for this long.
        """
        self._host = host
        self._resend_seconds = resend_seconds
        self._progress_seconds = progress_seconds
        self._context = zmq.Context()
        self._idle: tuple[str, zmq.Socket[bytes]] | None = None
        """An endpoint, and a connection to it on which nothing is under way."""

    @property
    def medium(self) -> type[Medium]:
        return ZeromqMedium

    def chunks(
        self, blob: Blob, medium: Medium, indices: Sequence[int], patience: Patience
    ) -> Generator[Chunk, None, None]:
        assert isinstance(medium, ZeromqMedium)
        socket = self._connect(_reachable(medium.endpoint, self._host))
        try:
            yield from self._pull(socket, blob, medium, indices, patience)
        except BaseException:
            # Answers may still be on their way; the next transfer begins without them.
            socket.close()
            raise
        self._idle = _reachable(medium.endpoint, self._host), socket

    def _connect(self, endpoint: str) -> zmq.Socket[bytes]:
        """The connection of the transfer before, if it led there."""
        idle, self._idle = self._idle, None
        if idle is not None:
            known, socket = idle
            if known == endpoint:
                return socket
            socket.close()
        return _dealer(self._context, endpoint)

    def close(self) -> None:
        if self._idle is not None:
            self._idle[1].close()
        self._context.term()

    def _pull(
        self,
        socket: zmq.Socket[bytes],
        blob: Blob,
        medium: ZeromqMedium,
        indices: Sequence[int],
        patience: Patience,
    ) -> Generator[Chunk, None, None]:
        requests = _Requests(socket, blob, indices)
        waiting_for = f"{medium.endpoint} to send version {blob.version}"
        progress = resent = time.monotonic()
        while requests.fill():
            patience.check(waiting_for)
            if socket.poll(_POLL_MILLISECONDS, zmq.POLLIN):
                for chunk in requests.receive():
                    progress = time.monotonic()
                    yield chunk
                continue
            now = time.monotonic()
            if now - progress > self._progress_seconds:
                raise WeightTransferError(
                    f"no chunk in {self._progress_seconds} s while waiting for {waiting_for}"
                )
            if now - max(progress, resent) > self._resend_seconds:
                resent = now
                requests.resend()


def _reachable(endpoint: str, host: str) -> str:
    """The endpoint, at `host` if it is every address of its machine."""
    for everywhere in ("tcp://0.0.0.0:", "tcp://[::]:"):
        if endpoint.startswith(everywhere):
            return f"tcp://{join_address(host, int(endpoint.removeprefix(everywhere)))}"
    return endpoint


class _Wanted(NamedTuple):
    """A chunk that is to be asked for."""

    chunk: int
    """Its index in the blob."""
    key: tuple[bytes, int]
    """How the server knows it."""
    num_bytes: int
    request: bytes


class _Requests:
    """The chunks that are still to be asked for, and those that are asked for."""

    def __init__(self, socket: zmq.Socket[bytes], blob: Blob, indices: Sequence[int]) -> None:
        self._socket = socket
        self._blob = blob
        self._todo = [_wanted(blob, index) for index in reversed(indices)]
        self._outstanding: dict[tuple[bytes, int], _Wanted] = {}
        self._outstanding_bytes = 0

    def fill(self) -> bool:
        """Sends requests as far as the credits go, once half of them are free. False when every chunk is here."""
        if 2 * len(self._outstanding) <= MAX_REQUESTS and 2 * self._outstanding_bytes <= CREDIT_BYTES:
            taken = []
            while self._todo and self._has_credit(self._todo[-1]):
                wanted = self._todo.pop()
                self._outstanding[wanted.key] = wanted
                self._outstanding_bytes += wanted.num_bytes
                taken.append(wanted)
            self._send(taken)
        return bool(self._outstanding)

    def resend(self) -> None:
        self._send(sorted(self._outstanding.values()))

    def receive(self) -> Iterator[Chunk]:
        """Reads one answer; of its chunks, those that somebody waits for."""
        frames = self._socket.recv_multipart(copy=False)
        if len(frames) % 2:
            raise WeightTransferError(
                f"an answer of {len(frames)} frames; expected headers and chunks in turn"
            )
        for head, chunk in zip(frames[::2], frames[1::2], strict=True):
            header = _parse_header(head.bytes)
            wanted = self._outstanding.get((header.source, header.index))
            if wanted is None:
                continue
            if not header.found:
                raise WeightTransferError(
                    f"the server holds version {self._blob.version} no more; fetch a newer version"
                )
            del self._outstanding[wanted.key]
            self._outstanding_bytes -= wanted.num_bytes
            yield wanted.chunk, np.frombuffer(chunk.buffer, dtype=np.uint8)

    def _has_credit(self, wanted: _Wanted) -> bool:
        if not self._outstanding:
            return True
        return (
            len(self._outstanding) < MAX_REQUESTS
            and self._outstanding_bytes + wanted.num_bytes <= CREDIT_BYTES
        )

    def _send(self, several: Sequence[_Wanted]) -> None:
        for together in _messages(several):
            try:
                self._socket.send_multipart([wanted.request for wanted in together], zmq.NOBLOCK)
            except zmq.Again:
                # The queue to a server that is not there is full; `resend` comes back to it.
                _log.debug("requests for %d chunks are held back: the queue is full", len(together))


def _wanted(blob: Blob, index: int) -> _Wanted:
    digest, source_index = blob.origin(index)
    source = bytes.fromhex(digest)
    request = weights_pb2.ChunkRequest(digest=blob.chunk_digests[index], source=source, index=source_index)
    return _Wanted(index, (source, source_index), blob.size_of(index), request.SerializeToString())


def _messages(several: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Cuts into what is asked for together."""
    together: list[_Wanted] = []
    num_bytes = 0
    for wanted in several:
        if together and (len(together) == MESSAGE_CHUNKS or num_bytes + wanted.num_bytes > MESSAGE_BYTES):
            yield together
            together, num_bytes = [], 0
        together.append(wanted)
        num_bytes += wanted.num_bytes
    if together:
        yield together


def _hold(blob: Blob, medium: SharedMemoryMedium) -> _Held:
    segment = open_segment(medium, blob.num_bytes)
    if segment.nonce != medium.nonce:
        raise WeightTransferError(f"segment {medium.name} does not hold version {blob.version} (any more)")
    return _Held(blob=blob, nonce=medium.nonce, segment=segment)


def _parse_requests(frames: Sequence[bytes]) -> list[weights_pb2.ChunkRequest]:
    """Nothing, unless all of them are some."""
    if len(frames) > MESSAGE_CHUNKS:
        return []
    try:
        requests = [weights_pb2.ChunkRequest.FromString(frame) for frame in frames]
    except DecodeError:
        return []
    are_whole = all(len(each.digest) == len(each.source) == DIGEST_BYTES for each in requests)
    return requests if are_whole else []


def _parse_header(frame: bytes) -> weights_pb2.ChunkHeader:
    try:
        return weights_pb2.ChunkHeader.FromString(frame)
    except DecodeError as error:
        raise WeightTransferError(f"an answer whose header is no ChunkHeader: {error}") from error


def _router(context: zmq.Context[zmq.Socket[bytes]], bind: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    # Where it is not needed it would write IPv4 addresses as IPv6 ones.
    _configure(socket, max_message_bytes=_MAX_REQUEST_BYTES, ipv6="[" in bind)
    try:
        socket.bind(bind)
    except zmq.ZMQError as error:
        socket.close()
        context.term()
        raise ConfigError(
            f"cannot serve weights on {bind}: {error}; expected tcp://HOST:PORT, free"
        ) from error
    return socket


def _dealer(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    _configure(socket, max_message_bytes=MAX_CHUNK_BYTES + 64 * 1024, ipv6=True)
    try:
        if not endpoint.startswith("tcp://"):
            raise WeightTransferError(f"{endpoint!r} is no endpoint for weights; expected tcp://HOST:PORT")
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise WeightTransferError(f"cannot connect to {endpoint!r} for weights: {error}") from error
    except WeightTransferError:
        socket.close()
        raise
    return socket


def _configure(socket: zmq.Socket[bytes], *, max_message_bytes: int, ipv6: bool) -> None:
    for option, value in (
        (zmq.IPV6, int(ipv6)),
        (zmq.LINGER, 0),
        (zmq.MAXMSGSIZE, max_message_bytes),
        (zmq.SNDHWM, _QUEUE_MESSAGES),
        (zmq.RCVHWM, _QUEUE_MESSAGES),
        (zmq.HEARTBEAT_IVL, 2000),
        (zmq.HEARTBEAT_TIMEOUT, 8000),
        (zmq.HANDSHAKE_IVL, 5000),
    ):
        socket.setsockopt(option, value)
