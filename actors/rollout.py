"""Plays one lease: an episode of an environment, driven by an engine.

    first observation -> turn -> step -> observation -> turn -> ... -> reward

Environment text enters the tokens once, with loss mask 0; what the policy sampled
enters as the ids it sampled, each with its log-probability and version.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from actors.engines.base import Engine, GenerationRequest, StopReason
from actors.handover import HandoverMismatch, Recorded, RecordedTurn
from actors.render import Renderer
from environments.base import Description, StepResult
from environments.client import EnvironmentClient, Episode
from penstock.errors import EngineFault, EnvironmentFault, EnvironmentFull, FaultKind
from penstock.trajectory import (
    FinishReason,
    Lease,
    Partial,
    PolicyVersion,
    Reward,
    RewardStatus,
    TokenIds,
    Trajectory,
    run_length,
)
from penstock.waits import Waits

_log = logging.getLogger(__name__)

_MAX_TURNS = 1000
ENGINE_SECONDS = 120.0
"""An engine that is asked for tokens, and makes none for this long, is at a standstill."""


class PartialSource(Protocol):
    """A rollout that is being played."""

    def played(self, start: int = 0) -> Partial | None:
        """Its tokens from `start` on; None while there are none that it sampled itself."""
        ...


@dataclass(slots=True)
class Progress:
    """Totals of a running rollout; the learner extends its lease when they grow."""

    num_tokens: int = 0
    num_turns: int = 0
    environment_since: float | None = None
    """Monotonic seconds from when it waits for its environment; None while it does not."""
    partial: Partial | None = None
    """Set when the rollout is cancelled: what another actor may go on from."""
    source: PartialSource | None = None
    """Tells what was played so far. Another one once the rollout began anew."""


@dataclass(slots=True)
class Running:
    """A lease that is being played."""

    lease: Lease
    progress: Progress
    task: asyncio.Task[None]
    began: float
    """Monotonic seconds."""
    revoked: bool = False


@dataclass(slots=True)
class _Tokens:
    """The trajectory's arrays, as they grow."""

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[PolicyVersion] = field(default_factory=list)

    def observe(self, token_ids: TokenIds) -> None:
        self.ids += token_ids.tolist()
        self.mask += [0] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)

    def sample(self, token_ids: tuple[int, ...], logprobs: tuple[float, ...], version: PolicyVersion) -> None:
        self.ids += token_ids
        self.mask += [1] * len(token_ids)
        self.logprobs += logprobs
        self.versions += [version] * len(token_ids)

    def take(self, turn: RecordedTurn) -> None:
        self.ids += turn.token_ids
        self.mask += [1] * len(turn.token_ids)
        self.logprobs += turn.logprobs
        self.versions += turn.versions

    @property
    def num_sampled(self) -> int:
        return len(self.versions)


@dataclass(frozen=True, slots=True)
class _Turn:
    token_ids: list[int]
    stopped: bool
    """The policy ended the turn itself."""


class Player:
    """Plays leases of one environment on one engine."""

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        client: EnvironmentClient,
        *,
        truncation_reward: float | None = None,
        waits: Waits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_answers = 0
        """Resets and steps that its environment answered."""
        self.waited_seconds = 0.0
        """What they took in all."""
        self._ids = random.Random(secrets.randbits(128))
        """Of trajectories. The system's own generator is a call of the kernel for each."""
        self._engine = engine
        self._renderer = renderer
        self._client = client
        self._truncation_reward = truncation_reward
        self._clock = clock
        self._waits = waits or Waits(clock)
        self._description: Description | None = None

    @property
    def max_sessions(self) -> int | None:
        """Sessions that its environment has room for; None if unbounded, or not known yet."""
        return self._description.max_sessions or None if self._description is not None else None

    async def play(self, lease: Lease, session_id: str, progress: Progress) -> Trajectory:
        """Plays to the reward. Raises EnvironmentFault, EngineFault."""
        if self._description is None:
            self._description = await self._client.describe()
        try:
            return await _Rollout(self, self._description, lease, progress).play(session_id)
        except HandoverMismatch as mismatch:
            _log.warning("lease %s begins anew: %s", lease.lease_id, mismatch)
            progress.num_tokens = progress.num_turns = 0
            anew = _Rollout(self, self._description, replace(lease, partial=None), progress)
            return await anew.play(f"{session_id}.anew")
        except EnvironmentFull:
            raise
        except EnvironmentFault:
            # The server may come back as another version of itself.
            self._description = None
            raise


class _Rollout:
    """The state of one episode."""

    def __init__(self, player: Player, description: Description, lease: Lease, progress: Progress) -> None:
        self._player = player
        self._description = description
        self._lease = lease
        self._progress = progress
        progress.source = self
        self._tokens = _Tokens()
        self._recorded = Recorded(lease.partial)
        self._observation_digest = ""
        self._cut = False
        self._generation_seconds = lease.partial.generation_seconds if lease.partial else 0.0
        self._environment_seconds = lease.partial.environment_seconds if lease.partial else 0.0

    async def play(self, session_id: str) -> Trajectory:
        """Plays to the reward; if cancelled, leaves behind what was played. Raises HandoverMismatch too."""
        try:
            return await self._play(session_id)
        except asyncio.CancelledError:
            self._progress.partial = self._partial()
            raise

    async def _play(self, session_id: str) -> Trajectory:
        player, lease = self._player, self._lease
        opened = player._client.session(session_id=session_id, fence=lease.attempt + 1, task=lease.task)
        async with contextlib.AsyncExitStack() as stack:
            with self._asking("a reset"):
                episode = await stack.enter_async_context(opened)
            self._observation_digest = episode.observation_digest
            self._recorded.check_start(
                version=self._description.version,
                digest=self._description.digest,
                observation_digest=episode.observation_digest,
            )
            self._observe(player._renderer.first(episode.messages))
            if not self._has_room():
                raise EnvironmentFault(
                    f"the prompt has {len(self._tokens.ids)} tokens, which leaves none to sample of a context of "
                    f"{player._engine.max_context}: leave such tasks out, or raise the actors' max_context",
                    kind=FaultKind.DATA,
                )
            while True:
                turn = await self._generate()
                result = await self._step(episode, turn)
                if result.done or not self._has_room():
                    break
                following = player._renderer.following(result.messages, stopped=turn.stopped)
                if len(following) >= player._engine.max_context - len(self._tokens.ids):
                    # Nothing could be sampled after it, and what is only read teaches nothing.
                    break
                self._observe(following)
            self._recorded.check_over()
            return self._trajectory(episode, turn, result)

    def _observe(self, token_ids: TokenIds) -> None:
        self._recorded.check_observation(token_ids)
        self._tokens.observe(token_ids)

    async def _generate(self) -> _Turn:
        """Samples one turn, or what is left of a recorded one."""
        player = self._player
        recorded = self._recorded.next_turn()
        if recorded is not None:
            self._tokens.take(recorded)
            self._progress.num_tokens = self._tokens.num_sampled
            stopped = recorded.stopped or recorded.token_ids[-1] in player._renderer.stop_ids
            if recorded.finished or stopped or not self._has_room():
                return self._end_turn(list(recorded.token_ids), stopped=stopped)
        began = player._clock()
        request = GenerationRequest(
            request_id=f"{self._lease.lease_id}/{self._progress.num_turns}",
            prompt_ids=np.asarray(self._tokens.ids, dtype=np.int32),
            sampling=replace(self._lease.sampling, max_tokens=self._room()),
        )
        token_ids: list[int] = [] if recorded is None else list(recorded.token_ids)
        turn: _Turn | None = None
        reason: StopReason | None = None
        chunks = aiter(player._engine.generate(request))
        while True:
            with player._waits.on("tokens", owner="the engine", limit_seconds=ENGINE_SECONDS):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            self._tokens.sample(chunk.token_ids, chunk.logprobs, chunk.version)
            token_ids += chunk.token_ids
            reason = chunk.stop_reason
            self._progress.num_tokens = self._tokens.num_sampled
            if reason in (StopReason.STOP, StopReason.LENGTH):
                # At once: a rollout that is cancelled now hands over a finished turn.
                turn = self._end_turn(token_ids, stopped=reason is StopReason.STOP)
        if turn is None:
            raise EngineFault(f"generation ended with {reason or 'nothing'}; expected stop or length")
        self._generation_seconds += player._clock() - began
        return turn

    def _end_turn(self, token_ids: list[int], *, stopped: bool) -> _Turn:
        self._progress.num_turns += 1
        self._cut = not stopped
        return _Turn(token_ids, stopped)

    async def _step(self, episode: Episode, turn: _Turn) -> StepResult:
        player = self._player
        limit = self._description.max_turns or _MAX_TURNS
        with self._asking("a step"):
            result = await episode.step(player._renderer.text(turn.token_ids))
        if not result.done and self._progress.num_turns >= limit:
            raise EnvironmentFault(
                f"{self._description.name} is not done after {limit} turns; expected at most max_turns",
                kind=FaultKind.DATA,
            )
        return result

    def _partial(self) -> Partial | None:
        """What was played so far, if a token was sampled; as it was given, if not all of that is taken yet."""
        return self.played() if self._recorded.is_over else self._lease.partial

    def played(self, start: int = 0) -> Partial | None:
        tokens, description = self._tokens, self._description
        num_sampled = sum(tokens.mask[start:])
        if num_sampled == 0 or not self._recorded.is_over:
            return None
        return Partial(
            token_ids=np.asarray(tokens.ids[start:], dtype=np.int32),
            loss_mask=np.asarray(tokens.mask[start:], dtype=np.uint8),
            logprobs=np.asarray(tokens.logprobs[start:], dtype=np.float32),
            versions=run_length(tokens.versions[-num_sampled:]),
            num_turns=self._progress.num_turns,
            cut=self._cut,
            environment_version=description.version,
            environment_digest=description.digest,
            observation_digest=self._observation_digest,
            generation_seconds=self._generation_seconds,
            environment_seconds=self._environment_seconds,
        )

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """A call of the environment, whose client has a deadline for it."""
        player, client = self._player, self._player._client
        limit = client.reset_timeout_seconds if what == "a reset" else client.step_timeout_seconds
        owner = f"environment {self._description.name} at {client.address}"
        began = self._progress.environment_since = player._clock()
        try:
            with player._waits.on(what, owner=owner, limit_seconds=limit):
                yield
        finally:
            self._progress.environment_since = None
        seconds = player._clock() - began
        self._environment_seconds += seconds
        player.num_answers += 1
        player.waited_seconds += seconds

    def _room(self) -> int:
        """Tokens that may still be sampled."""
        of_episode = self._lease.sampling.max_tokens - self._tokens.num_sampled
        return min(of_episode, self._player._engine.max_context - len(self._tokens.ids))

    def _has_room(self) -> bool:
        return self._room() > 0

    def _trajectory(self, episode: Episode, turn: _Turn, result: StepResult) -> Trajectory:
        tokens, description = self._tokens, self._description
        return Trajectory(
            trajectory_id=f"{self._player._ids.getrandbits(128):032x}",
            lease_id=self._lease.lease_id,
            token_ids=np.asarray(tokens.ids, dtype=np.int32),
            loss_mask=np.asarray(tokens.mask, dtype=np.uint8),
            logprobs=np.asarray(tokens.logprobs, dtype=np.float32),
            versions=run_length(tokens.versions),
            reward=self._reward(result),
            finish_reason=FinishReason.DONE if turn.stopped and result.done else FinishReason.LENGTH,
            num_turns=self._progress.num_turns,
            task=self._lease.task,
            environment_version=description.version,
            environment_digest=description.digest,
            observation_digest=episode.observation_digest,
            metrics=result.metrics,
            generation_seconds=self._generation_seconds,
            environment_seconds=self._environment_seconds,
        )

    def _reward(self, result: StepResult) -> Reward:
        """The environment's, or the configured one of a truncated episode. Raises EnvironmentFault."""
        if result.done:
            if result.reward.status is not RewardStatus.VALID:
                raise EnvironmentFault(
                    f"the reward is {result.reward.status}: {result.reward.message}", kind=FaultKind.DATA
                )
            return result.reward
        if self._player._truncation_reward is not None:
            return Reward.valid(self._player._truncation_reward)
        raise EnvironmentFault(
            f"the episode was cut after {self._tokens.num_sampled} sampled tokens, before its environment was "
            "done: raise sampling.max_tokens, or set truncation_reward",
            kind=FaultKind.DATA,
        )
