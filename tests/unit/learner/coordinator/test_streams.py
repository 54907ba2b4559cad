"""Long rollouts are told piece by piece, and gone on from elsewhere should their actor die."""

from __future__ import annotations

import numpy as np
import pytest

from learner.config import FleetConfig
from learner.coordinator.fleet import ReportedStats
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.leases import RolloutReport
from learner.coordinator.records import EventLogged, PartialStored
from learner.coordinator.streams import Piece, Streams
from penstock.codec import partial_from_wire
from penstock.trajectory import Lease, PolicyVersion, VersionSpan
from penstock.v1 import trajectory_pb2

from .fakes import Submitter, acquire, join, make_message, make_partial, make_scheduler, start

OLD, NEW = PolicyVersion(1, 0), PolicyVersion(1, 1)


def piece(lease: Lease, start: int, token_ids: list[int], version: PolicyVersion) -> Piece:
    """Two prompt tokens, if it is the first; all others sampled."""
    num_prompt = 2 if start == 0 else 0
    mask = np.array([0] * num_prompt + [1] * (len(token_ids) - num_prompt), dtype=np.uint8)
    sent = make_partial(
        lease,
        version,
        token_ids=np.array(token_ids, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask == 1, np.float32(-0.5), np.float32(0)).astype(np.float32),
        versions=(VersionSpan(version, int(mask.sum())),),
    )
    return Piece(lease.lease_id, start, sent.payload, sent.checksum)


@pytest.fixture
def lease() -> Lease:
    scheduler = make_scheduler()
    return acquire(scheduler, join(scheduler), start(scheduler), num=1)[0]


def streams(*, max_bytes: int = 10_000, max_tokens: int = 64) -> Streams:
    return Streams(max_bytes=max_bytes, max_tokens=max_tokens)


def test_pieces_are_put_together_with_the_version_of_each_token(lease: Lease):
    kept = streams()
    assert kept.keep(piece(lease, 0, [1, 2, 3, 4], OLD)) == 4
    assert kept.keep(piece(lease, 4, [5], OLD)) == 5
    assert kept.keep(piece(lease, 5, [6, 7], NEW)) == 7
    sent = kept.take(lease.lease_id)
    assert sent is not None
    whole = partial_from_wire(trajectory_pb2.Partial.FromString(sent.payload))
    assert whole.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert whole.loss_mask.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert whole.versions == (VersionSpan(OLD, 3), VersionSpan(NEW, 2))
    assert kept.take(lease.lease_id) is None
    assert kept.num_bytes == 0


def test_a_piece_that_does_not_follow_or_was_changed_is_not_kept(lease: Lease):
    kept = streams()
    first = piece(lease, 0, [1, 2, 3, 4], OLD)
    kept.keep(first)
    assert kept.keep(piece(lease, 9, [5], OLD)) == 4
    assert kept.keep(first._replace(checksum=first.checksum ^ 1)) == 4
    assert kept.keep(piece(lease, 0, [1, 2, 7], OLD)) == 3, "from the beginning, it takes the other's place"


def test_a_stream_that_finds_no_room_or_is_unsound_is_ended(lease: Lease):
    short = streams(max_tokens=5)
    assert short.keep(piece(lease, 0, [1, 2, 3, 4], OLD)) == 4
    assert short.keep(piece(lease, 4, [5, 6], OLD)) is None
    small = streams(max_bytes=4 * 9)
    assert small.keep(piece(lease, 0, [1, 2, 3, 4], OLD)) == 4
    assert small.keep(piece(lease, 4, [5], OLD)) is None
    garbage = Piece(lease.lease_id, 0, b"\xff", 0)
    unsound = streams()
    assert unsound.keep(garbage) == 0, "the checksum is wrong"
    for ended in (short, small):
        assert ended.num_bytes == 0
        assert ended.num_refused == 1


class Stream:
    """One actor in the midst of a rollout."""

    def __init__(self, fleet: FleetConfig | None = None) -> None:
        self.scheduler = make_scheduler(fleet=fleet, groups_per_step=1)
        self.version = start(self.scheduler)
        self.session_id = join(self.scheduler, "victim")
        (self.lease,) = acquire(self.scheduler, self.session_id, self.version, num=1)

    def tell(self, *pieces: Piece) -> list[int | None]:
        return self.scheduler.keep_pieces(self.session_id, pieces, 0.0)

    def successor(self) -> tuple[Submitter, Lease]:
        submit = Submitter(self.scheduler, join(self.scheduler, "successor", now=20.0))
        leases = self.scheduler.acquire(
            submit.session_id, self.version, f"digest of step {self.version.step}", 1, 20.0
        )[0]
        return submit, leases[0]

    def stored(self) -> list[PartialStored]:
        return [r for r in self.scheduler.take_records() if isinstance(r, PartialStored)]


def test_a_dead_actors_rollout_is_gone_on_from():
    run = Stream()
    assert run.tell(piece(run.lease, 0, [1, 2, 3, 4], run.version)) == [4]
    run.scheduler.tick(20.0)
    (stored,) = run.stored()
    assert (stored.group_id, stored.slot, stored.num_tokens) == (run.lease.group_id, run.lease.slot, 2)
    submit, lease = run.successor()
    assert lease.continues
    assert submit(make_message(lease, run.version), now=20.0).state is not None
    assert run.scheduler.board.streams.num_bytes == 0


def test_it_is_told_how_much_was_kept():
    run = Stream()
    run.scheduler.heartbeat(
        run.session_id,
        installed=run.version,
        stats=ReportedStats(),
        progress=[RolloutReport(run.lease.lease_id, 3, 0)],
        now=0.0,
    )
    run.tell(piece(run.lease, 0, [1, 2, 3, 4], run.version))
    run.scheduler.tick(20.0)
    events = [
        r.message for r in run.scheduler.take_records() if isinstance(r, EventLogged) and r.kind == "kept"
    ]
    assert events == ["1 rollouts of victim, with 2 of the 3 tokens that it told of"]


def test_a_rollout_survives_more_than_one_death():
    run = Stream()
    run.tell(piece(run.lease, 0, [1, 2, 3, 4], run.version))
    run.scheduler.tick(20.0)
    run.successor()
    # Its actor was started again, and knows nothing of the lease.
    third = Submitter(run.scheduler, join(run.scheduler, "successor", now=21.0))
    (lease,) = acquire(run.scheduler, third.session_id, run.version, num=1, now=21.0)
    assert lease.continues, "the second died before it had told anything"
    third.release(lease, LeaseOutcome.INFRASTRUCTURE, "it does not go on from here", now=21.0)
    (anew,) = acquire(run.scheduler, third.session_id, run.version, num=1, now=21.0)
    assert not anew.continues, "what came to a fault is not tried again"


def test_a_lease_without_progress_and_one_whose_engine_failed_are_gone_on_from():
    run = Stream(FleetConfig(dead_seconds=1000.0, suspect_seconds=500.0))
    run.tell(piece(run.lease, 0, [1, 2, 3, 4], run.version))
    run.scheduler.tick(61.0)
    assert len(run.stored()) == 1
    failing = Stream()
    failing.tell(piece(failing.lease, 0, [1, 2, 3, 4], failing.version))
    Submitter(failing.scheduler, failing.session_id).release(failing.lease, LeaseOutcome.ENGINE, "no memory")
    assert len(failing.stored()) == 1


def test_what_came_to_its_end_is_forgotten_and_nothing_of_it_is_written():
    run = Stream()
    run.tell(piece(run.lease, 0, [1, 2, 3, 4], run.version))
    Submitter(run.scheduler, run.session_id)(make_message(run.lease, run.version))
    assert run.scheduler.board.streams.num_bytes == 0
    assert not run.stored()


def test_only_the_holder_of_a_lease_may_tell_of_it():
    run = Stream()
    stranger = join(run.scheduler, "stranger")
    told = piece(run.lease, 0, [1, 2, 3, 4], run.version)
    assert run.scheduler.keep_pieces(stranger, [told], 0.0) == [None]
    assert run.tell(told._replace(lease_id="9.9.9")) == [None]


def test_an_unsound_stream_is_not_gone_on_from():
    run = Stream()
    run.tell(piece(run.lease, 0, [1, 2, 999, 4], run.version))
    run.scheduler.tick(20.0)
    assert not run.stored()
    assert not run.successor()[1].continues
