"""An actor's stream over a real ledger: what is acknowledged, and who is woken by it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from learner.coordinator.core import Coordinator
from learner.coordinator.groups import LeaseOutcome
from learner.coordinator.intake import Intake
from learner.coordinator.ledger import Ledger, _Write
from learner.coordinator.records import TrajectoryState
from penstock.codec import checksum
from penstock.errors import LedgerError, PeerLost, SequenceGap
from penstock.signals import Stop
from penstock.trajectory import Lease, PolicyVersion
from penstock.v1 import coordinator_pb2 as pb

from .fakes import acquire, join, make_message, make_scheduler, start

CREDITS = pb.Credits(num_trajectories=8, num_bytes=1 << 20)


class Stream:
    """The server's end of an actor's stream."""

    def __init__(self) -> None:
        self.answers: list[pb.SubmitResponse] = []

    async def write(self, answer: pb.SubmitResponse) -> None:
        self.answers.append(answer)


class Run:
    """A coordinator with one actor, which holds four leases."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path)
        self.scheduler = make_scheduler(history=self.ledger)
        self.coordinator = Coordinator(self.scheduler, self.ledger, Stop(), run_id="r", clock=lambda: 0.0)
        self.version: PolicyVersion = start(self.scheduler)
        self.session_id = join(self.scheduler)
        self.leases: list[Lease] = acquire(self.scheduler, self.session_id, self.version, num=4)
        self.stream = Stream()

    def item(self, sequence: int, lease: Lease) -> pb.SubmitItem:
        payload = make_message(lease, self.version).SerializeToString()
        return pb.SubmitItem(sequence=sequence, trajectory=payload, checksum=checksum(payload))

    async def take(
        self, *messages: list[pb.SubmitItem], when_decided: Callable[[], None] = lambda: None
    ) -> None:
        async def requests() -> AsyncIterator[pb.SubmitRequest]:
            for items in messages:
                yield pb.SubmitRequest(session_id=self.session_id, items=items)
            when_decided()

        await Intake(self.coordinator, CREDITS).run(requests(), self.stream)  # type: ignore[arg-type]

    @property
    def acknowledged(self) -> list[int]:
        return [answer.acknowledged for answer in self.stream.answers]

    @property
    def sequences(self) -> list[int]:
        return [verdict.sequence for answer in self.stream.answers for verdict in answer.verdicts]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "ledger.sqlite")
    yield made
    made.ledger.close()


async def test_each_message_is_acknowledged_in_order_once_it_is_on_disk(run: Run):
    await run.coordinator.commit()
    await run.take(
        [run.item(1, run.leases[0]), run.item(2, run.leases[1])],
        [run.item(3, run.leases[2])],
    )
    assert run.acknowledged in ([2, 3], [3])
    assert run.sequences == [1, 2, 3]
    assert run.ledger.totals().by_state == {TrajectoryState.PENDING: 3}


async def test_messages_that_one_commit_wrote_share_an_acknowledgement(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    await run.coordinator.commit()
    all_decided = threading.Event()
    commit = run.ledger._commit

    def commit_later(batch: list[_Write]) -> LedgerError | None:
        assert all_decided.wait(timeout=10.0)
        return commit(batch)

    monkeypatch.setattr(run.ledger, "_commit", commit_later)
    messages = [[run.item(number, lease)] for number, lease in enumerate(run.leases, start=1)]
    await run.take(*messages, when_decided=all_decided.set)
    assert run.acknowledged in ([1, 4], [4]), "the first was being written when the others came"
    assert run.sequences == [1, 2, 3, 4]


async def test_what_came_before_a_gap_is_acknowledged_and_then_the_gap_is_named(run: Run):
    await run.coordinator.commit()
    with pytest.raises(SequenceGap, match="send again from 2"):
        await run.take([run.item(1, run.leases[0])], [run.item(3, run.leases[1])])
    assert run.acknowledged == [1]


async def test_a_stream_of_an_unknown_session_is_refused(run: Run):
    run.session_id = "never"
    with pytest.raises(PeerLost, match="join again"):
        await run.take([run.item(1, run.leases[0])])
    assert run.acknowledged == []


async def test_nothing_is_acknowledged_that_could_not_be_written(run: Run):
    await run.coordinator.commit()
    await run.take([run.item(1, run.leases[0])])
    run.ledger._failed = LedgerError("the disk is gone")
    with pytest.raises(LedgerError, match="the disk is gone"):
        await run.take([run.item(2, run.leases[1])], [run.item(3, run.leases[2])])
    assert run.acknowledged == [1]


async def test_what_actors_do_all_the_time_wakes_the_trainer_but_no_other_actor(run: Run):
    await run.coordinator.commit()
    changed, news = run.coordinator.changed.next(), run.coordinator.news.next()
    await run.take([run.item(1, run.leases[0])])
    assert changed.is_set()
    assert not news.is_set()


async def test_a_lease_that_is_free_again_wakes_the_actors(run: Run):
    await run.coordinator.commit()
    news = run.coordinator.news.next()
    run.scheduler.docket.release(
        run.session_id, 1, run.leases[0].lease_id, LeaseOutcome.INFRASTRUCTURE, "died", 0.0
    )
    await run.coordinator.commit()
    assert news.is_set()


async def test_a_surplus_trajectory_wakes_the_actors(run: Run):
    """Its slot may be free."""
    await run.coordinator.commit()
    await run.take([run.item(1, run.leases[0])])
    news = run.coordinator.news.next()
    await run.take([run.item(2, run.leases[0])])
    assert news.is_set()
    assert run.stream.answers[-1].verdicts[0].kind == pb.VERDICT_KIND_SURPLUS
