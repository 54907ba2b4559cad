"""Pieces of long rollouts: when they are cut, and where the next one begins."""

from __future__ import annotations

import numpy as np

from actors.rollout import Progress
from actors.streaming import Streamer
from penstock.codec import partial_from_wire
from penstock.trajectory import Partial, PolicyVersion, VersionSpan
from penstock.v1 import coordinator_pb2 as pb
from penstock.v1 import trajectory_pb2

VERSION = PolicyVersion(1, 0)
LEASE = "4.2.0"


class Writing:
    """A rollout of two prompt tokens and ever more sampled ones."""

    def __init__(self) -> None:
        self.progress = Progress(source=self)

    def write(self, num_tokens: int) -> None:
        self.progress.num_tokens += num_tokens

    def played(self, start: int = 0) -> Partial | None:
        ids = np.arange(2 + self.progress.num_tokens, dtype=np.int32)[start:]
        mask = (ids >= 2).astype(np.uint8)
        return Partial(
            token_ids=ids,
            loss_mask=mask,
            logprobs=np.zeros(len(ids), dtype=np.float32),
            versions=(VersionSpan(VERSION, int(mask.sum())),),
            num_turns=0,
            cut=False,
            environment_version="1",
            environment_digest="ab",
            observation_digest="cd",
        )


def tell(streamer: Streamer, rollout: Writing, *, held: int | None = None, enough: bool = False) -> list[int]:
    """Sends what is due, and answers it; returns the token ids of the piece."""
    pieces = streamer.pieces({LEASE: rollout.progress})
    for piece in pieces:
        ids = partial_from_wire(trajectory_pb2.Partial.FromString(piece.partial)).token_ids.tolist()
        num_held = piece.start + len(ids) if held is None else held
        streamer.answered([pb.HeldPieces(lease_id=LEASE, num_tokens=num_held, enough=enough)])
        return ids
    return []


def test_short_rollouts_are_never_told():
    streamer, rollout = Streamer(every_tokens=4), Writing()
    rollout.write(3)
    assert not streamer.is_due({LEASE: rollout.progress})
    assert not tell(streamer, rollout)


def test_each_piece_begins_where_the_last_one_ended():
    streamer, rollout = Streamer(every_tokens=4), Writing()
    rollout.write(4)
    assert tell(streamer, rollout) == [0, 1, 2, 3, 4, 5]
    rollout.write(3)
    assert not tell(streamer, rollout)
    rollout.write(2)
    assert tell(streamer, rollout) == [6, 7, 8, 9, 10]


def test_what_was_not_answered_is_told_again():
    streamer, rollout = Streamer(every_tokens=4), Writing()
    rollout.write(4)
    streamer.pieces({LEASE: rollout.progress})
    rollout.write(1)
    assert tell(streamer, rollout) == [0, 1, 2, 3, 4, 5, 6]


def test_a_learner_that_holds_nothing_any_more_is_told_everything():
    streamer, rollout = Streamer(every_tokens=4), Writing()
    rollout.write(4)
    tell(streamer, rollout)
    rollout.write(4)
    assert tell(streamer, rollout, held=0) == [6, 7, 8, 9]
    assert tell(streamer, rollout) == list(range(10))


def test_a_rollout_that_began_anew_is_told_from_its_start():
    streamer, rollout, anew = Streamer(every_tokens=4), Writing(), Writing()
    rollout.write(4)
    tell(streamer, rollout)
    anew.write(9)
    assert tell(streamer, anew) == list(range(11))


def test_nothing_more_is_told_of_what_finds_no_room():
    streamer, rollout = Streamer(every_tokens=4), Writing()
    rollout.write(4)
    tell(streamer, rollout, enough=True)
    rollout.write(100)
    assert not streamer.is_due({LEASE: rollout.progress})


def test_it_may_be_switched_off():
    streamer, rollout = Streamer(every_tokens=0), Writing()
    rollout.write(1000)
    assert not tell(streamer, rollout)
