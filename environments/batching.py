"""Answers that wait are scored together: a scorer that has a whole batch at once is fed one.

Nobody waits for a batch to fill. Whoever comes while every worker is busy waits in line, and
the first of the line, once a worker is free, takes the others along.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from environments import frames
from environments.base import Description, StepResult
from environments.hosts import SingleTurnHost, checked
from environments.pool import PoolBusy, WorkerPool
from penstock.errors import EnvironmentFault, ProtocolError
from penstock.trajectory import Task

MAX_BATCH = 64
MAX_BATCH_CHARACTERS = 512 * 1024
"""Of the answers of a batch of several: a message to a worker is bounded."""


@dataclass(slots=True, eq=False)
class _Waiting:
    task: Task
    action: str
    outcome: StepResult | EnvironmentFault | None = None
    in_line: bool = True
    """Not taken into a batch (any more)."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has an outcome, or is in line again."""


class BatchedHost(SingleTurnHost):
    """A SingleTurnHost whose scorer takes several answers a call."""

    def __init__(self, description: Description, pool: WorkerPool, *, scorer_seconds: float) -> None:
        super().__init__(description, pool, scorer_seconds=scorer_seconds)
        # First come, first served, as `_line` is: a batch's members are let in right behind its leader.
        self._turns = asyncio.Semaphore(pool.num_workers)
        self._line: deque[_Waiting] = deque()

    async def score(self, task: Task, action: str, seconds: float) -> StepResult:
        """Raises EnvironmentFault, also for a batch that took too long: no answer of it is known to be at fault."""
        waiting = _Waiting(task, action)
        self._line.append(waiting)
        try:
            async with asyncio.timeout(seconds):
                while waiting.outcome is None:
                    async with self._turns:
                        if waiting.in_line:
                            await self._score_next()
                    if not waiting.in_line:
                        await waiting.moved.wait()
        except TimeoutError:
            raise PoolBusy(f"the answer was not scored within {seconds:.3g} s") from None
        finally:
            if waiting.in_line:
                self._line.remove(waiting)
        if isinstance(waiting.outcome, EnvironmentFault):
            raise waiting.outcome
        return waiting.outcome

    async def _score_next(self) -> None:
        """Takes a batch from the line, and gives each member its outcome."""
        batch = self._take()
        try:
            results = await self._scored(batch)
        except EnvironmentFault as fault:
            for waiting in batch:
                waiting.outcome = fault
                waiting.moved.set()
            return
        except BaseException:
            # The leader alone is out of time: the others are scored in another batch.
            self._line.extendleft(reversed(batch))
            for waiting in batch:
                waiting.in_line = True
                waiting.moved.set()
            raise
        for waiting, result in zip(batch, results, strict=True):
            waiting.outcome = result
            waiting.moved.set()

    def _take(self) -> list[_Waiting]:
        batch = [self._line.popleft()]
        size = len(batch[0].action)
        while self._line and len(batch) < MAX_BATCH:
            size += len(self._line[0].action)
            if size > MAX_BATCH_CHARACTERS:
                break
            batch.append(self._line.popleft())
        for waiting in batch:
            waiting.in_line = False
            waiting.moved.clear()
        return batch

    async def _scored(self, batch: list[_Waiting]) -> list[StepResult]:
        answers = [[frames.task_to_json(waiting.task), waiting.action] for waiting in batch]
        async with self._pool.borrowed(self._scorer_seconds) as (worker, left):
            reply = await worker.call("score_batch", left, answers=answers)
        return checked(lambda value: _results(value, len(batch)), reply)


def _results(value: object, count: int) -> list[StepResult]:
    """Raises ProtocolError."""
    if not isinstance(value, list) or len(value) != count:
        got = f"{len(value)} results" if isinstance(value, list) else type(value).__name__
        raise ProtocolError(f"a batch of {count} answers got {got}")
    results = [frames.result_from_json(each) for each in value]
    if not all(result.done for result in results):
        raise ProtocolError("a batch's result is not done; its only turn is also the last")
    return results
