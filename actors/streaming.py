"""Tells the learner what was played of long rollouts, piece by piece, in case this actor dies. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actors.rollout import PartialSource, Progress
from penstock.codec import checksum, partial_to_wire
from penstock.v1 import coordinator_pb2 as pb

MAX_BYTES_A_BEAT = 4 * 1024 * 1024
"""Of pieces in one heartbeat, beyond the first."""


@dataclass(slots=True)
class _Told:
    """What the learner holds of one rollout, and the piece that it has not answered."""

    source: PartialSource
    num_tokens: int = 0
    num_sampled: int = 0
    sent_tokens: int = 0
    sent_sampled: int = 0


class Streamer:
    """Cuts pieces off rollouts, each once it has `every_tokens` more sampled tokens. 0: never."""

    def __init__(self, *, every_tokens: int) -> None:
        self._every_tokens = every_tokens
        self._told: dict[str, _Told] = {}
        self._enough: set[str] = set()

    def is_due(self, rollouts: Mapping[str, Progress]) -> bool:
        return any(self._is_due(lease_id, progress) for lease_id, progress in rollouts.items())

    def pieces(self, rollouts: Mapping[str, Progress]) -> list[pb.PartialPiece]:
        """Of every rollout that is due, as far as one heartbeat should bring; the others are due next."""
        self._forget(rollouts)
        pieces: list[pb.PartialPiece] = []
        num_bytes = 0
        for lease_id, progress in rollouts.items():
            piece = self._piece(lease_id, progress) if self._is_due(lease_id, progress) else None
            if piece is not None:
                num_bytes += len(piece.partial)
                if pieces and num_bytes > MAX_BYTES_A_BEAT:
                    break
                pieces.append(piece)
        return pieces

    def answered(self, held: Iterable[pb.HeldPieces]) -> None:
        for answer in held:
            told = self._told.get(answer.lease_id)
            if told is None:
                continue
            if answer.enough:
                self._enough.add(answer.lease_id)
            elif answer.num_tokens == told.sent_tokens:
                told.num_tokens, told.num_sampled = told.sent_tokens, told.sent_sampled
            elif answer.num_tokens != told.num_tokens:
                # The learner was started again, or a reply was lost: from the beginning.
                told.num_tokens = told.num_sampled = 0

    def _is_due(self, lease_id: str, progress: Progress) -> bool:
        if not self._every_tokens or progress.source is None or lease_id in self._enough:
            return False
        told = self._told.get(lease_id)
        num_sampled = told.num_sampled if told is not None and told.source is progress.source else 0
        return progress.num_tokens - num_sampled >= self._every_tokens

    def _piece(self, lease_id: str, progress: Progress) -> pb.PartialPiece | None:
        source = progress.source
        assert source is not None
        told = self._told.get(lease_id)
        if told is None or told.source is not source:
            told = self._told[lease_id] = _Told(source)
        partial = source.played(told.num_tokens)
        if partial is None:
            return None
        told.sent_tokens = told.num_tokens + len(partial.loss_mask)
        told.sent_sampled = told.num_sampled + int(partial.loss_mask.sum())
        payload = partial_to_wire(partial).SerializeToString()
        return pb.PartialPiece(
            lease_id=lease_id, start=told.num_tokens, partial=payload, checksum=checksum(payload)
        )

    def _forget(self, rollouts: Mapping[str, Progress]) -> None:
        for lease_id in self._told.keys() - rollouts.keys():
            del self._told[lease_id]
            self._enough.discard(lease_id)
