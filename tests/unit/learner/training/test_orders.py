from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from learner.training.coordinator import NextBatch
from learner.training.loop import Position
from learner.training.orders import Leave, Orders, Train, Wait, WriteCheckpoint
from learner.training.parallel import Ranks
from penstock.errors import PeerLost, ProtocolError
from tests.trainer_fakes import FakeCoordinator, NeverStop, make_batch

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


@dataclass
class Script(FakeCoordinator):
    """Gives one answer after the other."""

    def __init__(self, *answers: NextBatch) -> None:
        super().__init__()
        self.answers = list(answers)

    def next_batch(self, *, epoch: int, step: int, wait_seconds: float) -> NextBatch:
        return self.answers.pop(0)


class StopNow:
    def is_set(self) -> bool:
        return True


WAIT = NextBatch(batch=None, waiting="no actors")
BATCH = NextBatch(batch=make_batch(0))


def take(coordinator: FakeCoordinator, ranks: Ranks = ONE_RANK, stop: object = None) -> list[object]:
    position = Position(epoch=1, step=0)
    orders = []
    for order in Orders(coordinator, ranks, position, stop or NeverStop()).until(1):
        orders.append(order)
        position.step += isinstance(order, Train)
    return orders


def test_a_batch_is_waited_for_and_trained() -> None:
    *waits, order = take(Script(WAIT, WAIT, BATCH))
    assert waits == [Wait(), Wait()]
    assert isinstance(order, Train)
    assert order.batch is BATCH.batch


def test_a_checkpoint_is_written_before_the_batch_and_at_every_request() -> None:
    asking = replace(WAIT, checkpoint_requested=True)
    orders = take(Script(asking, WAIT, asking, replace(BATCH, checkpoint_requested=True)))
    assert [type(order) for order in orders] == [
        WriteCheckpoint,
        Wait,
        WriteCheckpoint,
        WriteCheckpoint,
        Train,
    ]


@pytest.mark.parametrize("answer", [WAIT, BATCH])
def test_a_stop_goes_before_everything(answer: NextBatch) -> None:
    assert take(Script(replace(answer, stop_requested=True))) == [Leave()]
    assert take(Script(answer), stop=StopNow()) == [Leave()]


def test_losing_the_coordinator_while_stopping_is_no_failure() -> None:
    class Gone(FakeCoordinator):
        def next_batch(self, *, epoch: int, step: int, wait_seconds: float) -> NextBatch:
            raise PeerLost("the coordinator is gone")

    assert take(Gone(), stop=StopNow()) == [Leave()]
    with pytest.raises(PeerLost):
        take(Gone())


def two_ranks(rank: int, other: Callable[[torch.Tensor], torch.Tensor]) -> Ranks:
    """One of two ranks; `other` tells what the second contributes when the first contributes a tensor."""

    class Pair(Ranks):
        def maximum(self, values: torch.Tensor) -> torch.Tensor:
            return torch.maximum(values, other(values))

    return Pair(rank=rank, world_size=2, device=torch.device("cpu"), mesh=None)


def test_another_rank_fetches_what_rank_0_was_given() -> None:
    ready = torch.tensor([1, 0, 0])
    second = two_ranks(1, lambda values: ready if values.numel() == 3 else values)
    (order,) = take(Script(WAIT, BATCH), second)
    assert isinstance(order, Train)


def test_a_stop_seen_by_another_rank_stops_this_one() -> None:
    assert take(Script(BATCH), two_ranks(0, lambda values: torch.tensor([0, 0, 1]))) == [Leave()]


def test_ranks_that_were_given_different_batches_refuse_to_train() -> None:
    different = two_ranks(
        0, lambda values: torch.zeros(3, dtype=torch.int64) if values.numel() == 3 else values + 1
    )
    with pytest.raises(ProtocolError, match="different batches for step 0"):
        take(Script(BATCH), different)
