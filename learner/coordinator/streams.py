"""What actors tell of long rollouts while they play them, so that another can go on should they die. Pure.

A stream is the beginning of one rollout: pieces in their order, in memory, until the lease
ends. Nothing of it is written to the ledger unless its lease comes to nothing; then it is
handed over like what a leaving actor sends. After a restart of the coordinator actors begin
their streams again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.message import DecodeError

from learner.coordinator.partials import SentPartial
from penstock.codec import checksum
from penstock.v1 import trajectory_pb2

_BYTES_PER_TOKEN = 9


class Piece(NamedTuple):
    """Tokens of one lease's rollout, from `start` on."""

    lease_id: str
    start: int
    payload: bytes
    """A Partial."""
    checksum: int


@dataclass(slots=True)
class _Stream:
    """Arrays of T tokens so far."""

    rest: trajectory_pb2.Partial
    """All but arrays and versions, as the newest piece says."""
    token_ids: bytearray = field(default_factory=bytearray)
    loss_mask: bytearray = field(default_factory=bytearray)
    logprobs: bytearray = field(default_factory=bytearray)
    versions: list[trajectory_pb2.VersionSpan] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.loss_mask)

    def append(self, piece: trajectory_pb2.Partial) -> None:
        self.token_ids += piece.token_ids
        self.loss_mask += piece.loss_mask
        self.logprobs += piece.logprobs
        for span in piece.versions:
            if self.versions and self.versions[-1].version == span.version:
                self.versions[-1].num_tokens += span.num_tokens
            else:
                self.versions.append(span)
        for name in ("token_ids", "loss_mask", "logprobs", "versions"):
            piece.ClearField(name)
        self.rest = piece

    def whole(self) -> SentPartial:
        message = trajectory_pb2.Partial(
            token_ids=bytes(self.token_ids),
            loss_mask=bytes(self.loss_mask),
            logprobs=bytes(self.logprobs),
            versions=self.versions,
        )
        message.MergeFrom(self.rest)
        payload = message.SerializeToString()
        return SentPartial(payload, checksum(payload))


class Streams:
    """Streams by lease, of bounded size in all."""

    def __init__(self, *, max_bytes: int, max_tokens: int) -> None:
        """max_tokens: of one rollout, prompt and observations included."""
        self.num_bytes = 0
        self.num_refused = 0
        """Streams that were ended because they found no room, or were unsound."""
        self._max_bytes = max_bytes
        self._max_tokens = max_tokens
        self._streams: dict[str, _Stream] = {}

    def keep(self, piece: Piece) -> int | None:
        """Tokens that are held of the piece's lease; None if no more of it are wanted.

        A piece whose bytes changed on the way, or that does not begin where the stream ends, is
        not kept: the actor sees it by the number, and goes on from there.
        """
        stream = self._streams.get(piece.lease_id)
        num_held = stream.num_tokens if stream else 0
        if checksum(piece.payload) != piece.checksum or piece.start not in (0, num_held):
            return num_held
        try:
            message = trajectory_pb2.Partial.FromString(piece.payload)
        except DecodeError:
            self._refuse(piece.lease_id)
            return None
        num_tokens = len(message.loss_mask)
        is_whole = {len(message.token_ids), len(message.logprobs)} == {4 * num_tokens}
        has_room = self.num_bytes + _BYTES_PER_TOKEN * num_tokens <= self._max_bytes
        if not (is_whole and has_room and piece.start + num_tokens <= self._max_tokens):
            self._refuse(piece.lease_id)
            return None
        if stream is None or piece.start == 0:
            self.discard(piece.lease_id)
            stream = self._streams[piece.lease_id] = _Stream(message)
        stream.append(message)
        self.num_bytes += _BYTES_PER_TOKEN * num_tokens
        return stream.num_tokens

    def take(self, lease_id: str) -> SentPartial | None:
        """All that is held of a lease's rollout, which is then forgotten."""
        stream = self._streams.get(lease_id)
        self.discard(lease_id)
        return None if stream is None else stream.whole()

    def discard(self, lease_id: str) -> None:
        stream = self._streams.pop(lease_id, None)
        if stream is not None:
            self.num_bytes -= _BYTES_PER_TOKEN * stream.num_tokens

    def _refuse(self, lease_id: str) -> None:
        self.discard(lease_id)
        self.num_refused += 1
