"""Between generated messages and the values that the rest of the code sees.

Decoding checks what a message's form alone can tell (lengths, dtypes, known enum
values) and raises ProtocolError; what needs the run's state is checked by the
coordinator's validation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import xxhash

from penstock.errors import ProtocolError
from penstock.rpc import to_duration, to_seconds
from penstock.trajectory import (
    FinishReason,
    InstallMode,
    Lease,
    Partial,
    Pin,
    PolicyVersion,
    Reward,
    RewardStatus,
    Sampling,
    Task,
    Trajectory,
    VersionSpan,
)
from penstock.v1 import coordinator_pb2, trajectory_pb2, weights_pb2
from penstock.weights.manifest import (
    DIGEST_BYTES,
    AdapterUpdate,
    CollectiveMedium,
    Delta,
    Factor,
    Manifest,
    Medium,
    SharedMemoryMedium,
    Snapshot,
    TensorEntry,
    ZeromqMedium,
    adapter_digest,
    check_manifest,
    delta_digest,
)
from penstock.weights.media.collective import Invitation

_REWARD_STATUS = {
    RewardStatus.VALID: trajectory_pb2.REWARD_STATUS_VALID,
    RewardStatus.NOT_YET: trajectory_pb2.REWARD_STATUS_NOT_YET,
    RewardStatus.UNSCORABLE: trajectory_pb2.REWARD_STATUS_UNSCORABLE,
    RewardStatus.INFRASTRUCTURE_ERROR: trajectory_pb2.REWARD_STATUS_INFRASTRUCTURE_ERROR,
    RewardStatus.SCORER_TIMEOUT: trajectory_pb2.REWARD_STATUS_SCORER_TIMEOUT,
}
_REWARD_STATUS_BACK = {wire: status for status, wire in _REWARD_STATUS.items()}
_FINISH_REASON = {
    FinishReason.DONE: trajectory_pb2.FINISH_REASON_DONE,
    FinishReason.LENGTH: trajectory_pb2.FINISH_REASON_LENGTH,
}
_FINISH_REASON_BACK = {wire: reason for reason, wire in _FINISH_REASON.items()}
_INSTALL_MODE = {
    InstallMode.KEEP: coordinator_pb2.INSTALL_MODE_KEEP,
    InstallMode.RECOMPUTE: coordinator_pb2.INSTALL_MODE_RECOMPUTE,
}
_INSTALL_MODE_BACK = {wire: mode for mode, wire in _INSTALL_MODE.items()}


def version_to_wire(version: PolicyVersion) -> trajectory_pb2.PolicyVersion:
    return trajectory_pb2.PolicyVersion(epoch=version.epoch, step=version.step)


def version_from_wire(message: trajectory_pb2.PolicyVersion) -> PolicyVersion:
    return PolicyVersion(message.epoch, message.step)


def install_mode_to_wire(mode: InstallMode) -> coordinator_pb2.InstallMode.ValueType:
    return _INSTALL_MODE[mode]


def install_mode_from_wire(message: coordinator_pb2.InstallMode.ValueType) -> InstallMode:
    """Raises ProtocolError."""
    mode = _INSTALL_MODE_BACK.get(message)
    if mode is None:
        raise ProtocolError(f"install mode is {message}; expected one of {sorted(_INSTALL_MODE_BACK)}")
    return mode


def task_to_wire(task: Task) -> trajectory_pb2.Task:
    return trajectory_pb2.Task(
        environment=task.environment, split=task.split, index=task.index, seed=task.seed
    )


def task_from_wire(message: trajectory_pb2.Task) -> Task:
    return Task(message.environment, message.split, message.index, message.seed)


def reward_to_wire(reward: Reward) -> trajectory_pb2.Reward:
    return trajectory_pb2.Reward(
        status=_REWARD_STATUS[reward.status], value=reward.value, message=reward.message
    )


def reward_from_wire(message: trajectory_pb2.Reward) -> Reward:
    """Raises ProtocolError for an unknown status, or a value where there may be none."""
    status = _REWARD_STATUS_BACK.get(message.status)
    if status is None:
        raise ProtocolError(
            f"reward status is {message.status}; expected one of {sorted(_REWARD_STATUS_BACK)}"
        )
    value = message.value if message.HasField("value") else None
    if (status is RewardStatus.VALID) != (value is not None):
        raise ProtocolError(
            f"reward has status {status} and value {value}; only VALID has a value, and always"
        )
    return Reward(status=status, value=value, message=message.message)


def sampling_to_wire(sampling: Sampling) -> trajectory_pb2.Sampling:
    return trajectory_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
    )


def sampling_from_wire(message: trajectory_pb2.Sampling) -> Sampling:
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        max_tokens=message.max_tokens,
        seed=message.seed,
    )


def lease_to_wire(lease: Lease) -> coordinator_pb2.Lease:
    return coordinator_pb2.Lease(
        lease_id=lease.lease_id,
        group_id=lease.group_id,
        slot=lease.slot,
        attempt=lease.attempt,
        task=task_to_wire(lease.task),
        sampling=sampling_to_wire(lease.sampling),
        progress_timeout=to_duration(lease.progress_timeout_seconds),
        rival=lease.rival,
        pin=None if lease.pin is None else _pin_to_wire(lease.pin),
    )


def lease_from_wire(message: coordinator_pb2.Lease) -> Lease:
    return Lease(
        lease_id=message.lease_id,
        group_id=message.group_id,
        slot=message.slot,
        attempt=message.attempt,
        task=task_from_wire(message.task),
        sampling=sampling_from_wire(message.sampling),
        progress_timeout_seconds=to_seconds(message.progress_timeout),
        rival=message.rival,
        continues=bool(message.partial),
        partial=_partial_of(message),
        pin=_pin_from_wire(message.pin) if message.HasField("pin") else None,
    )


def _pin_to_wire(pin: Pin) -> coordinator_pb2.Pin:
    return coordinator_pb2.Pin(version=version_to_wire(pin.version), limit=to_duration(pin.limit_seconds))


def _pin_from_wire(message: coordinator_pb2.Pin) -> Pin:
    return Pin(version_from_wire(message.version), to_seconds(message.limit))


def _partial_of(message: coordinator_pb2.Lease) -> Partial | None:
    """What a lease brings to go on from; nothing if its bytes changed on the way."""
    if not message.partial or checksum(message.partial) != message.partial_checksum:
        return None
    return partial_from_wire(trajectory_pb2.Partial.FromString(message.partial))


def partial_to_wire(partial: Partial) -> trajectory_pb2.Partial:
    return trajectory_pb2.Partial(
        token_ids=partial.token_ids.astype("<i4", copy=False).tobytes(),
        loss_mask=partial.loss_mask.astype("u1", copy=False).tobytes(),
        logprobs=partial.logprobs.astype("<f4", copy=False).tobytes(),
        versions=_spans_to_wire(partial.versions),
        num_turns=partial.num_turns,
        cut=partial.cut,
        environment_version=partial.environment_version,
        environment_digest=partial.environment_digest,
        observation_digest=partial.observation_digest,
        generation_seconds=partial.generation_seconds,
        environment_seconds=partial.environment_seconds,
    )


def partial_from_wire(message: trajectory_pb2.Partial) -> Partial:
    """Raises ProtocolError if an array is not whole or the arrays differ in length."""
    _check_lengths(message)
    return Partial(
        token_ids=np.frombuffer(message.token_ids, dtype="<i4"),
        loss_mask=np.frombuffer(message.loss_mask, dtype="u1"),
        logprobs=np.frombuffer(message.logprobs, dtype="<f4"),
        versions=_spans_from_wire(message.versions),
        num_turns=message.num_turns,
        cut=message.cut,
        environment_version=message.environment_version,
        environment_digest=message.environment_digest,
        observation_digest=message.observation_digest,
        generation_seconds=message.generation_seconds,
        environment_seconds=message.environment_seconds,
    )


def trajectory_to_wire(trajectory: Trajectory) -> trajectory_pb2.Trajectory:
    return trajectory_pb2.Trajectory(
        trajectory_id=trajectory.trajectory_id,
        lease_id=trajectory.lease_id,
        token_ids=trajectory.token_ids.astype("<i4", copy=False).tobytes(),
        loss_mask=trajectory.loss_mask.astype("u1", copy=False).tobytes(),
        logprobs=trajectory.logprobs.astype("<f4", copy=False).tobytes(),
        versions=_spans_to_wire(trajectory.versions),
        reward=reward_to_wire(trajectory.reward),
        finish_reason=_FINISH_REASON[trajectory.finish_reason],
        num_turns=trajectory.num_turns,
        task=task_to_wire(trajectory.task),
        environment_version=trajectory.environment_version,
        environment_digest=trajectory.environment_digest,
        observation_digest=trajectory.observation_digest,
        metrics=dict(trajectory.metrics),
        generation_seconds=trajectory.generation_seconds,
        environment_seconds=trajectory.environment_seconds,
    )


def trajectory_item(trajectory: Trajectory) -> coordinator_pb2.SubmitItem:
    """The item that submits a trajectory: its bytes, and the checksum that they keep for good."""
    payload = trajectory_to_wire(trajectory).SerializeToString()
    return coordinator_pb2.SubmitItem(trajectory=payload, checksum=checksum(payload))


def checksum(payload: bytes) -> int:
    """XXH3, 64 bits: 0.1 us for a trajectory of 1,024 tokens, where CRC-32 takes 6 us."""
    return xxhash.xxh3_64_intdigest(payload)


def trajectory_from_wire(message: trajectory_pb2.Trajectory) -> Trajectory:
    """Raises ProtocolError if an array is not whole or the arrays differ in length."""
    _check_lengths(message)
    check_enums(message.finish_reason, message.reward)
    return Trajectory(
        trajectory_id=message.trajectory_id,
        lease_id=message.lease_id,
        token_ids=np.frombuffer(message.token_ids, dtype="<i4"),
        loss_mask=np.frombuffer(message.loss_mask, dtype="u1"),
        logprobs=np.frombuffer(message.logprobs, dtype="<f4"),
        versions=_spans_from_wire(message.versions),
        reward=reward_from_wire(message.reward),
        finish_reason=_FINISH_REASON_BACK[message.finish_reason],
        num_turns=message.num_turns,
        task=task_from_wire(message.task),
        environment_version=message.environment_version,
        environment_digest=message.environment_digest,
        observation_digest=message.observation_digest,
        metrics=dict(message.metrics),
        generation_seconds=message.generation_seconds,
        environment_seconds=message.environment_seconds,
    )


def _check_lengths(message: trajectory_pb2.Trajectory | trajectory_pb2.Partial) -> None:
    num_tokens = len(message.loss_mask)
    if num_tokens == 0:
        raise ProtocolError("loss_mask is empty; expected one byte a token")
    if len(message.token_ids) != 4 * num_tokens or len(message.logprobs) != 4 * num_tokens:
        raise ProtocolError(
            f"{len(message.token_ids)} bytes of token_ids and {len(message.logprobs)} of logprobs beside "
            f"{num_tokens} of loss_mask; expected 4, 4 and 1 a token"
        )


def _spans_to_wire(spans: Iterable[VersionSpan]) -> list[trajectory_pb2.VersionSpan]:
    return [
        trajectory_pb2.VersionSpan(version=version_to_wire(span.version), num_tokens=span.num_tokens)
        for span in spans
    ]


def _spans_from_wire(messages: Iterable[trajectory_pb2.VersionSpan]) -> tuple[VersionSpan, ...]:
    return tuple(VersionSpan(version_from_wire(span.version), span.num_tokens) for span in messages)


def check_enums(finish_reason: trajectory_pb2.FinishReason.ValueType, reward: trajectory_pb2.Reward) -> None:
    """Raises ProtocolError for an unknown finish reason, or a reward that `reward_from_wire` refuses."""
    if finish_reason not in _FINISH_REASON_BACK:
        raise ProtocolError(f"finish_reason is {finish_reason}; expected DONE or LENGTH")
    if reward.status != trajectory_pb2.REWARD_STATUS_VALID or not reward.HasField("value"):
        reward_from_wire(reward)


def manifest_to_wire(manifest: Manifest) -> weights_pb2.WeightManifest:
    return weights_pb2.WeightManifest(
        version=version_to_wire(manifest.version),
        tensors=[
            weights_pb2.WeightTensor(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                offset=tensor.offset,
                num_bytes=tensor.num_bytes,
            )
            for tensor in manifest.tensors
        ],
        num_bytes=manifest.num_bytes,
        chunk_bytes=manifest.chunk_bytes,
        chunk_digests=b"".join(manifest.chunk_digests),
        digest=manifest.digest,
        media=[_medium_to_wire(medium) for medium in manifest.media],
        deltas=[_delta_to_wire(delta) for delta in manifest.deltas],
        snapshot=None if manifest.snapshot is None else _snapshot_to_wire(manifest.snapshot),
        adapter=None if manifest.adapter is None else _adapter_to_wire(manifest.adapter),
    )


def manifest_from_wire(message: weights_pb2.WeightManifest) -> Manifest:
    """Raises ProtocolError unless layout, sizes and digests agree.

    Media of a kind that this program does not know are left out: a newer learner may
    offer more ways to the same bytes.
    """
    manifest = Manifest(
        version=version_from_wire(message.version),
        tensors=tuple(
            TensorEntry(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                offset=tensor.offset,
                num_bytes=tensor.num_bytes,
            )
            for tensor in message.tensors
        ),
        num_bytes=message.num_bytes,
        chunk_bytes=message.chunk_bytes,
        chunk_digests=_chunk_digests(message.chunk_digests),
        digest=message.digest,
        media=tuple(
            _medium_from_wire(medium) for medium in message.media if medium.WhichOneof("medium") is not None
        ),
        deltas=tuple(_delta_from_wire(delta) for delta in message.deltas),
        snapshot=_snapshot_from_wire(message.snapshot, message) if message.HasField("snapshot") else None,
        adapter=_adapter_from_wire(message) if message.HasField("adapter") else None,
    )
    check_manifest(manifest)
    return manifest


class ReportsStats(Protocol):
    """What an engine counts, on either side of the wire."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def tokens_per_second(self) -> float: ...
    @property
    def num_installs(self) -> int: ...
    @property
    def max_install_seconds(self) -> float: ...


def stats_to_wire(stats: ReportsStats) -> coordinator_pb2.EngineStats:
    return coordinator_pb2.EngineStats(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_tokens=stats.num_tokens,
        tokens_per_second=stats.tokens_per_second,
        num_installs=stats.num_installs,
        max_install_seconds=stats.max_install_seconds,
    )


def _chunk_digests(digests: bytes) -> tuple[bytes, ...]:
    if len(digests) % DIGEST_BYTES != 0:
        raise ProtocolError(f"chunk_digests has {len(digests)} bytes; expected a multiple of {DIGEST_BYTES}")
    return tuple(digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES))


def _delta_to_wire(delta: Delta) -> weights_pb2.WeightDelta:
    return weights_pb2.WeightDelta(
        version=version_to_wire(delta.version),
        base_digest=delta.base,
        result_digest=delta.result,
        num_bytes=delta.num_bytes,
        chunk_digests=b"".join(delta.chunk_digests),
        segment=_segment_to_wire(delta.segment),
        chunk_bytes=delta.chunk_bytes,
    )


def _delta_from_wire(message: weights_pb2.WeightDelta) -> Delta:
    digests = _chunk_digests(message.chunk_digests)
    return Delta(
        version=version_from_wire(message.version),
        base=message.base_digest,
        result=message.result_digest,
        num_bytes=message.num_bytes,
        chunk_bytes=message.chunk_bytes,
        chunk_digests=digests,
        digest=delta_digest(message.base_digest, message.result_digest, message.chunk_bytes, digests),
        segment=_segment_from_wire(message.segment),
    )


def _snapshot_to_wire(snapshot: Snapshot) -> weights_pb2.WeightSnapshot:
    return weights_pb2.WeightSnapshot(
        version=version_to_wire(snapshot.version),
        digest=snapshot.digest,
        chunk_digests=b"".join(snapshot.chunk_digests),
        segment=_segment_to_wire(snapshot.segment),
    )


def _snapshot_from_wire(
    message: weights_pb2.WeightSnapshot, manifest: weights_pb2.WeightManifest
) -> Snapshot:
    return Snapshot(
        version=version_from_wire(message.version),
        num_bytes=manifest.num_bytes,
        chunk_bytes=manifest.chunk_bytes,
        chunk_digests=_chunk_digests(message.chunk_digests),
        digest=message.digest,
        segment=_segment_from_wire(message.segment),
    )


def _adapter_to_wire(adapter: AdapterUpdate) -> weights_pb2.WeightAdapter:
    return weights_pb2.WeightAdapter(
        base=_snapshot_to_wire(adapter.base),
        factors=[
            weights_pb2.WeightFactor(tensor=factor.tensor, rank=factor.rank, scale=factor.scale)
            for factor in adapter.factors
        ],
        num_bytes=adapter.num_bytes,
        chunk_digests=b"".join(adapter.chunk_digests),
        segment=_segment_to_wire(adapter.segment),
    )


def _adapter_from_wire(message: weights_pb2.WeightManifest) -> AdapterUpdate:
    adapter = message.adapter
    base = _snapshot_from_wire(adapter.base, message)
    factors = tuple(
        Factor(tensor=factor.tensor, rank=factor.rank, scale=factor.scale) for factor in adapter.factors
    )
    digests = _chunk_digests(adapter.chunk_digests)
    return AdapterUpdate(
        version=version_from_wire(message.version),
        num_bytes=adapter.num_bytes,
        chunk_bytes=message.chunk_bytes,
        chunk_digests=digests,
        digest=adapter_digest(base.digest, message.digest, factors, digests),
        base=base,
        factors=factors,
        segment=_segment_from_wire(adapter.segment),
    )


def _segment_to_wire(segment: SharedMemoryMedium) -> weights_pb2.SharedMemoryMedium:
    return weights_pb2.SharedMemoryMedium(name=segment.name, nonce=segment.nonce)


def _segment_from_wire(message: weights_pb2.SharedMemoryMedium) -> SharedMemoryMedium:
    return SharedMemoryMedium(name=message.name, nonce=message.nonce)


def invitation_from_wire(message: coordinator_pb2.GroupInvitation) -> Invitation:
    return Invitation(
        group=message.group,
        port=message.port,
        rank=message.rank,
        size=message.size,
        backend=message.backend,
        piece_bytes=message.piece_bytes,
        timeout_seconds=to_seconds(message.timeout),
        forming_seconds=to_seconds(message.forming),
    )


def _medium_to_wire(medium: Medium) -> weights_pb2.WeightMedium:
    if isinstance(medium, SharedMemoryMedium):
        return weights_pb2.WeightMedium(shared_memory=_segment_to_wire(medium))
    if isinstance(medium, CollectiveMedium):
        return weights_pb2.WeightMedium(collective=weights_pb2.CollectiveMedium(group=medium.group))
    return weights_pb2.WeightMedium(zeromq=weights_pb2.ZeromqMedium(endpoint=medium.endpoint))


def _medium_from_wire(message: weights_pb2.WeightMedium) -> Medium:
    if message.HasField("shared_memory"):
        return _segment_from_wire(message.shared_memory)
    if message.HasField("collective"):
        return CollectiveMedium(group=message.collective.group)
    return ZeromqMedium(endpoint=message.zeromq.endpoint)
