"""Answers that come while the workers are busy are scored together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from environments import frames
from environments.base import Description, StepResult
from environments.batching import MAX_BATCH, MAX_BATCH_CHARACTERS, BatchedHost
from environments.pool import PoolBusy
from penstock.errors import EnvironmentFault
from penstock.trajectory import Reward, Task

TASK = Task("length", "train", 0, 0)
PATIENCE_SECONDS = 60.0
DESCRIPTION = Description(name="length", version="1", digest="00", splits={"train": 1})


class FakePool:
    """One worker, which scores an answer by its length; holds each batch until it is let go."""

    num_workers = 1

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self._gate = asyncio.Semaphore(0)
        self.fault: EnvironmentFault | None = None
        self.surplus = 0

    def let_go(self, num_batches: int) -> None:
        for _ in range(num_batches):
            self._gate.release()

    @contextlib.asynccontextmanager
    async def borrowed(self, seconds: float) -> AsyncIterator[tuple[FakePool, float]]:
        yield self, seconds

    async def call(self, call: str, seconds: float, *, answers: list[Any]) -> object:
        assert call == "score_batch"
        self.batches.append([action for _, action in answers])
        await self._gate.acquire()
        if self.fault is not None:
            raise self.fault
        results = [StepResult(done=True, reward=Reward.valid(len(action))) for _, action in answers]
        return [frames.result_to_json(result) for result in results][: len(answers) + self.surplus]


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def host(pool: FakePool) -> BatchedHost:
    return BatchedHost(DESCRIPTION, pool, scorer_seconds=PATIENCE_SECONDS)  # type: ignore[arg-type]


async def score(host: BatchedHost, action: str, seconds: float = PATIENCE_SECONDS) -> float | None:
    return (await host.score(TASK, action, seconds)).reward.value


async def fault_of(host: BatchedHost, action: str) -> EnvironmentFault | None:
    try:
        await score(host, action)
    except EnvironmentFault as fault:
        return fault
    return None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_an_answer_alone_is_scored_at_once(host: BatchedHost, pool: FakePool) -> None:
    pool.let_go(1)
    assert await score(host, "abc") == 3
    assert pool.batches == [["abc"]]


async def test_who_comes_while_the_worker_is_busy_is_scored_together(
    host: BatchedHost, pool: FakePool
) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(score(host, "x" * length)) for length in range(1, MAX_BATCH + 4)]
        await until(lambda: len(pool.batches) == 1 and len(host._line) == MAX_BATCH + 2)
        pool.let_go(3)
    assert [task.result() for task in tasks] == list(range(1, MAX_BATCH + 4))
    assert [len(batch) for batch in pool.batches] == [1, MAX_BATCH, 2]


async def test_a_batch_is_bounded_in_characters_too(host: BatchedHost, pool: FakePool) -> None:
    half = MAX_BATCH_CHARACTERS // 2
    async with asyncio.TaskGroup() as group:
        for length in (1, half, half, 1, 2 * MAX_BATCH_CHARACTERS):
            group.create_task(score(host, "x" * length))
        await until(lambda: len(host._line) == 4)
        pool.let_go(4)
    lengths = [[len(action) for action in batch] for batch in pool.batches]
    assert lengths == [[1], [half, half], [1], [2 * MAX_BATCH_CHARACTERS]]


async def test_a_fault_reaches_every_answer_of_the_batch_and_no_other(
    host: BatchedHost, pool: FakePool
) -> None:
    async with asyncio.TaskGroup() as group:
        first = group.create_task(score(host, "first"))
        await until(lambda: len(pool.batches) == 1)
        failing = [group.create_task(fault_of(host, action)) for action in ("a", "b")]
        await until(lambda: len(host._line) == 2)
        pool.let_go(1)
        await first
        pool.fault = EnvironmentFault("out of memory")
        pool.let_go(1)
    assert [task.result() for task in failing] == [pool.fault] * 2
    pool.fault = None
    pool.let_go(1)
    assert await score(host, "abc") == 3


async def test_a_leader_that_is_out_of_time_leaves_its_batch_to_the_others(
    host: BatchedHost, pool: FakePool
) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(score(host, "first"))
        await until(lambda: len(pool.batches) == 1)
        leader = group.create_task(score(host, "a"))
        other = group.create_task(score(host, "bb"))
        await until(lambda: len(host._line) == 2)
        pool.let_go(1)
        await until(lambda: len(pool.batches) == 2)
        leader.cancel()
        await until(lambda: len(pool.batches) == 3)
        pool.let_go(1)
    assert other.result() == 2
    assert pool.batches == [["first"], ["a", "bb"], ["bb"]]
    assert not host._line


async def test_an_answer_that_waits_too_long_is_a_fault_and_leaves_the_line(
    host: BatchedHost, pool: FakePool
) -> None:
    async with asyncio.TaskGroup() as group:
        first = group.create_task(score(host, "first"))
        await until(lambda: len(pool.batches) == 1)
        with pytest.raises(PoolBusy, match="not scored within"):
            await score(host, "b", seconds=0.05)
        assert not host._line
        pool.let_go(1)
    assert first.result() == 5


async def test_a_wrong_number_of_results_is_a_fault(host: BatchedHost, pool: FakePool) -> None:
    pool.surplus = -1
    pool.let_go(1)
    with pytest.raises(EnvironmentFault, match="a batch of 1 answers got 0 results"):
        await score(host, "a")
