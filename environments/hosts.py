"""How the calls of a session reach workers: any worker for a single turn, its own for an episode."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

from environments import frames
from environments.base import Description, Message, StepResult
from environments.pool import PoolBusy, WorkerPool
from environments.worker_process import Worker, WorkerTimeout
from penstock.errors import EnvironmentFault, PenstockError, ProtocolError
from penstock.trajectory import Reward, RewardStatus, Task

_log = logging.getLogger(__name__)

Messages = tuple[Message, ...]
ValueT = TypeVar("ValueT")

_CLOSE_SECONDS = 5.0
_MAX_SINGLE_TURN_SESSIONS = 16_384
_MAX_CACHED_CHARACTERS = 64 * 1024 * 1024


class Episode(Protocol):
    """Runs one session's code. Calls come one at a time; `close` comes once, and last."""

    async def reset(self, seconds: float) -> Messages:
        """Raises EnvironmentFault."""
        ...

    async def step(self, action: str, seconds: float) -> StepResult:
        """Raises EnvironmentFault."""
        ...

    async def close(self) -> None:
        """Frees what the episode holds."""
        ...


class Host(Protocol):
    """Makes the episodes of one environment."""

    @property
    def description(self) -> Description:
        """As served: `max_sessions` says how many this server can hold."""
        ...

    @property
    def keeps_state(self) -> bool:
        """A call that failed has spoilt its session."""
        ...

    def episode(self, task: Task) -> Episode: ...


class SingleTurnHost:
    """Any worker serves any session: prompts are remembered here, answers are scored in workers."""

    keeps_state = False

    def __init__(self, description: Description, pool: WorkerPool, *, scorer_seconds: float) -> None:
        max_sessions = description.max_sessions or _MAX_SINGLE_TURN_SESSIONS
        self.description = replace(description, max_sessions=max_sessions, max_turns=1)
        self._pool = pool
        self._scorer_seconds = scorer_seconds
        self._prompts = PromptCache(max_characters=_MAX_CACHED_CHARACTERS)
        self._asking: WeakValueDictionary[Task, asyncio.Lock] = WeakValueDictionary()
        """Held by who asks a worker for a task's prompt: a group's sessions want the same one at once."""

    def episode(self, task: Task) -> Episode:
        return _SingleTurn(self, task)

    async def prompt(self, task: Task, seconds: float) -> Messages:
        messages = self._prompts.get(task)
        return await self._ask(task, seconds) if messages is None else messages

    async def _ask(self, task: Task, seconds: float) -> Messages:
        """Asks a worker, unless another session does: then its answer serves both, and its fault only itself."""
        deadline = time.monotonic() + seconds
        asking = self._asking.setdefault(task, asyncio.Lock())
        try:
            async with asyncio.timeout(seconds):
                await asking.acquire()
        except TimeoutError:
            raise PoolBusy(
                f"{task} was asked for by others, and not answered within {seconds:.3g} s"
            ) from None
        try:
            messages = self._prompts.get(task)
            if messages is None:
                async with self._pool.borrowed(deadline - time.monotonic()) as (worker, left):
                    answer = await worker.call("prompt", left, task=frames.task_to_json(task))
                messages = checked(frames.messages_from_json, answer)
                self._prompts.put(task, messages)
            return messages
        finally:
            asking.release()

    async def score(self, task: Task, action: str, seconds: float) -> StepResult:
        """A scorer that had its full time and gave no answer is a reward's status; less time is a fault."""
        async with self._pool.borrowed(seconds) as (worker, left):
            try:
                answer = await worker.call(
                    "score", min(left, self._scorer_seconds), task=frames.task_to_json(task), action=action
                )
            except WorkerTimeout as timeout:
                if left < self._scorer_seconds:
                    raise
                return StepResult(
                    done=True, reward=Reward(status=RewardStatus.SCORER_TIMEOUT, message=str(timeout))
                )
        result = checked(frames.result_from_json, answer)
        if not result.done:
            raise EnvironmentFault("the scorer's result is not done; its only turn is also the last")
        return result


class _SingleTurn:
    def __init__(self, host: SingleTurnHost, task: Task) -> None:
        self._host = host
        self._task = task

    async def reset(self, seconds: float) -> Messages:
        return await self._host.prompt(self._task, seconds)

    async def step(self, action: str, seconds: float) -> StepResult:
        return await self._host.score(self._task, action, seconds)

    async def close(self) -> None:
        """Holds nothing."""


class PromptCache:
    """The prompts asked for most recently, up to a number of characters in all."""

    def __init__(self, *, max_characters: int) -> None:
        self._max_characters = max_characters
        self._num_characters = 0
        self._prompts: OrderedDict[Task, Messages] = OrderedDict()

    def get(self, task: Task) -> Messages | None:
        messages = self._prompts.get(task)
        if messages is not None:
            self._prompts.move_to_end(task)
        return messages

    def put(self, task: Task, messages: Messages) -> None:
        if task in self._prompts:
            return
        self._prompts[task] = messages
        self._num_characters += _num_characters(messages)
        while self._num_characters > self._max_characters:
            _, oldest = self._prompts.popitem(last=False)
            self._num_characters -= _num_characters(oldest)


def _num_characters(messages: Messages) -> int:
    """Counts some for the entry itself, so that empty prompts are bounded too."""
    return 200 + sum(len(message.role) + len(message.content) for message in messages)


class SteppedHost:
    """Each session has a worker of its own, from reset to close."""

    keeps_state = True

    def __init__(self, description: Description, pool: WorkerPool) -> None:
        max_sessions = min(description.max_sessions or pool.num_workers, pool.num_workers)
        self.description = replace(description, max_sessions=max_sessions)
        self._pool = pool

    def episode(self, task: Task) -> Episode:
        return _Stepped(self._pool, task)


class _Stepped:
    def __init__(self, pool: WorkerPool, task: Task) -> None:
        self._pool = pool
        self._task = task
        self._worker: Worker | None = None
        self._calling = asyncio.Lock()

    async def reset(self, seconds: float) -> Messages:
        async with self._calling:
            self._worker, left = await self._pool.borrow(seconds)
            answer = await self._worker.call("reset", left, task=frames.task_to_json(self._task))
        return checked(frames.messages_from_json, answer)

    async def step(self, action: str, seconds: float) -> StepResult:
        async with self._calling:
            if self._worker is None:
                raise EnvironmentFault("the session was closed while it was stepped")
            answer = await self._worker.call("step", seconds, action=action)
        return checked(frames.result_from_json, answer)

    async def close(self) -> None:
        """Waits for a call under way, which has a deadline of its own."""
        async with self._calling:
            worker, self._worker = self._worker, None
            if worker is None:
                return
            try:
                if worker.usable:
                    await worker.call("close", _CLOSE_SECONDS)
            except PenstockError as error:
                _log.warning("closing an episode of %s failed: %s", self._task.environment, error)
            finally:
                self._pool.release(worker)


def checked(decode: Callable[[object], ValueT], answer: object) -> ValueT:
    """What the environment's code gave, if it is what it should be; a fault otherwise."""
    try:
        return decode(answer)
    except ProtocolError as error:
        raise EnvironmentFault(f"the environment gave something else than it should: {error}") from error
