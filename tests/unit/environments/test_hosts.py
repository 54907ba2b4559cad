from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from environments import frames
from environments.base import Description, Message
from environments.hosts import PromptCache, SingleTurnHost
from environments.pool import PoolBusy, WorkerPool
from environments.worker_process import EnvironmentSpec
from penstock.errors import EnvironmentFault
from penstock.trajectory import Task


def prompt(length: int) -> tuple[Message, ...]:
    return (Message(role="user", content="x" * length),)


def test_a_prompt_is_remembered_for_its_task_and_seed() -> None:
    cache = PromptCache(max_characters=10_000)
    cache.put(Task("e", "train", 0, 1), prompt(3))
    assert cache.get(Task("e", "train", 0, 1)) == prompt(3)
    assert cache.get(Task("e", "train", 0, 2)) is None


def test_the_prompt_unused_for_longest_is_forgotten_first() -> None:
    cache = PromptCache(max_characters=3_000)
    tasks = [Task("e", "train", index, 0) for index in range(3)]
    cache.put(tasks[0], prompt(1_000))
    cache.put(tasks[1], prompt(1_000))
    assert cache.get(tasks[0]) is not None
    cache.put(tasks[2], prompt(1_000))
    assert [cache.get(task) is not None for task in tasks] == [True, False, True]


def test_empty_prompts_are_bounded_too() -> None:
    cache = PromptCache(max_characters=1_000)
    tasks = [Task("e", "train", index, 0) for index in range(100)]
    for task in tasks:
        cache.put(task, prompt(0))
    assert sum(cache.get(task) is not None for task in tasks) <= 5


class AskedPool:
    """A worker that answers a prompt once it is let go, and counts how often it was asked."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.let_go = asyncio.Event()
        self.faults: list[EnvironmentFault] = []

    @contextlib.asynccontextmanager
    async def borrowed(self, seconds: float) -> AsyncIterator[tuple[AskedPool, float]]:
        yield self, seconds

    async def call(self, call: str, seconds: float, *, task: dict[str, object]) -> object:
        assert call == "prompt"
        self.num_asked += 1
        await self.let_go.wait()
        if self.faults:
            raise self.faults.pop()
        return frames.messages_to_json(prompt(3))


@pytest.fixture
def pool() -> AskedPool:
    return AskedPool()


@pytest.fixture
def host(pool: AskedPool) -> SingleTurnHost:
    description = Description(name="e", version="1", digest="00", splits={"train": 8})
    return SingleTurnHost(description, pool, scorer_seconds=1.0)  # type: ignore[arg-type]


async def outcomes(host: SingleTurnHost, pool: AskedPool, tasks: list[Task]) -> list[object]:
    """Of resets that begin together, before a worker answers."""
    resets = [asyncio.create_task(host.episode(task).reset(60.0)) for task in tasks]
    await asyncio.sleep(0.01)
    pool.let_go.set()
    return await asyncio.gather(*resets, return_exceptions=True)


async def test_sessions_that_begin_together_ask_once_for_the_prompt_they_share(
    host: SingleTurnHost, pool: AskedPool
) -> None:
    siblings = [Task("e", "train", 0, 1)] * 16
    assert await outcomes(host, pool, [*siblings, Task("e", "train", 1, 1)]) == [prompt(3)] * 17
    assert pool.num_asked == 2


async def test_a_fault_is_of_the_session_that_asked_and_the_next_one_asks_again(
    host: SingleTurnHost, pool: AskedPool
) -> None:
    pool.faults = [EnvironmentFault("the worker died")]
    got = await outcomes(host, pool, [Task("e", "train", 0, 1)] * 3)
    assert isinstance(got[0], EnvironmentFault)
    assert got[1:] == [prompt(3)] * 2
    assert pool.num_asked == 2


async def test_who_waits_for_anothers_question_has_a_deadline_of_its_own(
    host: SingleTurnHost, pool: AskedPool
) -> None:
    first = asyncio.create_task(host.episode(Task("e", "train", 0, 1)).reset(60.0))
    await asyncio.sleep(0)
    with pytest.raises(PoolBusy, match=r"asked for by others, and not answered within 0\.05 s"):
        await host.episode(Task("e", "train", 0, 1)).reset(0.05)
    pool.let_go.set()
    assert await first == prompt(3)


async def test_a_worker_is_not_lent_for_less_time_than_a_call_takes() -> None:
    async with asyncio.TaskGroup() as group:
        pool = WorkerPool(EnvironmentSpec(target="none:None"), num_workers=1, group=group)
        pool._idle.put_nowait(UsableWorker())  # type: ignore[arg-type]
        with pytest.raises(PoolBusy):
            await pool.borrow(0.001)
        worker, left = await pool.borrow(1.0)
    assert worker.usable
    assert left <= 1.0


class UsableWorker:
    usable = True
