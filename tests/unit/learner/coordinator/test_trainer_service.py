"""Batches too large for one message, between a real TrainerService and the trainer's own decoding."""

from __future__ import annotations

from learner.coordinator.trainer_service import _MESSAGE_BYTES, _pieces
from learner.training.coordinator import _decode_next_batch
from penstock.trajectory import Lease, PolicyVersion, Sampling, Task
from penstock.v1 import trainer_pb2 as pb

from .fakes import make_message

VERSION = PolicyVersion(1, 0)


def lease(group_id: int, slot: int) -> Lease:
    return Lease(
        lease_id=f"{group_id}.{slot}.0",
        group_id=group_id,
        slot=slot,
        attempt=0,
        task=Task("words", "train", group_id, 1),
        sampling=Sampling(),
        progress_timeout_seconds=60.0,
    )


def test_a_small_group_is_one_message():
    assert list(_pieces([b"a", b"b"])) == [[b"a", b"b"]]


def test_a_large_group_is_cut_between_trajectories():
    half = bytes(_MESSAGE_BYTES // 2)
    assert [len(piece) for piece in _pieces([half, half, half, half, half])] == [2, 2, 1]
    assert [len(piece) for piece in _pieces([bytes(_MESSAGE_BYTES + 1), b"a"])] == [1, 1]


def test_a_group_in_pieces_is_one_group_again():
    answers = [
        pb.NextBatchResponse(
            group=pb.TrainingGroup(
                group_id=group_id, num_groups=2, trajectories=[make_message(lease(group_id, slot), VERSION)]
            )
        )
        for group_id in (4, 7)
        for slot in range(3)
    ]
    batch = _decode_next_batch(0, answers).batch
    assert batch is not None
    assert [group.group_id for group in batch.groups] == [4, 7]
    assert [t.lease_id for t in batch.groups[1].trajectories] == ["7.0.0", "7.1.0", "7.2.0"]
