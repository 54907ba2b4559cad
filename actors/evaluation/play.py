"""Plays an evaluation's questions on one engine: every answer, or why there is none."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.render import Renderer
from actors.rollout import Player, Progress
from penstock.errors import EngineFault, EnvironmentFault
from penstock.questions import Question
from penstock.scores import Answer
from penstock.trajectory import FinishReason, Lease, Sampling, Trajectory

PROGRESS_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """One episode."""

    question: Question
    answer: Answer | None
    """None after a fault."""
    fault: str = ""
    prompt: str = ""
    text: str = ""
    """What the policy wrote; of several turns, one after the other."""
    metrics: Mapping[str, float] | None = None


async def play_all(
    players: Mapping[str, Player],
    renderer: Renderer,
    questions: Sequence[Question],
    sampling: Callable[[int], Sampling],
    *,
    num_at_once: int,
    done: Callable[[Played], None],
) -> None:
    """Calls `done` for each episode as it ends. players: by environment. sampling: for an answer's seed."""
    room = asyncio.Semaphore(num_at_once)
    run = os.urandom(6).hex()

    async def play(number: int, question: Question) -> None:
        async with room:
            lease = Lease(
                lease_id=f"eval.{number}",
                group_id=number,
                slot=0,
                attempt=0,
                task=question.task,
                sampling=sampling(question.sampling_seed),
                progress_timeout_seconds=PROGRESS_SECONDS,
            )
            done(
                await _play(players[question.task.environment], renderer, lease, f"{run}.{number}", question)
            )

    async with asyncio.TaskGroup() as tasks:
        for number, question in enumerate(questions):
            tasks.create_task(play(number, question), name=f"question {number}")


async def _play(
    player: Player, renderer: Renderer, lease: Lease, session_id: str, question: Question
) -> Played:
    try:
        trajectory = await player.play(lease, session_id, Progress())
    except EnvironmentFault as fault:
        return Played(question=question, answer=None, fault=f"{fault.kind}: {fault}"[:200])
    except EngineFault as fault:
        return Played(question=question, answer=None, fault=f"engine: {fault}"[:200])
    return _played(question, trajectory, renderer)


def _played(question: Question, trajectory: Trajectory, renderer: Renderer) -> Played:
    assert trajectory.reward.value is not None
    sampled = trajectory.loss_mask == 1
    first = int(sampled.argmax())
    return Played(
        question=question,
        answer=Answer(
            prompt=question.task.index,
            reward=trajectory.reward.value,
            num_tokens=trajectory.num_sampled,
            truncated=trajectory.finish_reason is FinishReason.LENGTH,
        ),
        prompt=renderer.text(trajectory.token_ids[:first].tolist()),
        text=renderer.text(trajectory.token_ids[sampled].tolist()),
        metrics=trajectory.metrics,
    )
