"""Rollouts of actors that left or died: are they sound, and may another lease go on from them?

Their bytes lie in the ledger until their group is trained or dropped; a slot remembers
only what a decision needs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from google.protobuf.message import DecodeError

from learner.coordinator import validation
from learner.coordinator.groups import Group, HandedOver
from learner.coordinator.submissions import Arrays, check_arrays, span_flaw
from learner.coordinator.validation import Limits, Rejected, RejectionCode
from penstock.codec import checksum
from penstock.trajectory import PolicyVersion, VersionSpan
from penstock.v1 import trajectory_pb2

MAX_BYTES_A_GRANT = 8 * 1024 * 1024
"""Of partial rollouts in one answer to an actor, beyond the first."""


class SentPartial(NamedTuple):
    """A partial rollout's bytes, and the checksum that its actor made of them."""

    payload: bytes
    checksum: int


def check(
    sent: SentPartial, limits: Limits, published: Collection[PolicyVersion], group: Group, epoch: int
) -> HandedOver:
    """What a slot needs to know of a sound partial rollout. Raises Rejected."""
    if checksum(sent.payload) != sent.checksum:
        raise Rejected(RejectionCode.CORRUPT, "bytes of a partial rollout changed on the way")
    try:
        message = trajectory_pb2.Partial.FromString(sent.payload)
    except DecodeError as error:
        raise Rejected(RejectionCode.CORRUPT, f"{len(sent.payload)} bytes are no Partial: {error}") from error
    num_tokens = len(message.loss_mask)
    if num_tokens == 0 or {len(message.token_ids), len(message.logprobs)} != {4 * num_tokens}:
        raise Rejected(RejectionCode.BAD_LENGTHS, "the arrays of a partial rollout do not agree in length")
    arrays = Arrays(message.token_ids, message.loss_mask, message.logprobs)
    ((num_sampled, flaw),) = check_arrays([arrays], limits)
    spans = [
        VersionSpan(PolicyVersion(s.version.epoch, s.version.step), s.num_tokens) for s in message.versions
    ]
    flaw = flaw or span_flaw(spans, num_sampled)
    if flaw is not None:
        raise flaw
    validation.check_versions(spans, published)
    validation.check_observation(message.observation_digest, group.observation_digest)
    oldest = min((span.version for span in spans), key=lambda version: version.step)
    if oldest.epoch == epoch and oldest.step < group.born.step:
        raise Rejected(
            RejectionCode.BAD_VERSIONS, f"it began under {oldest}; its group was born at {group.born}"
        )
    return HandedOver(newest=spans[-1].version, num_bytes=len(sent.payload), num_tokens=num_sampled)
