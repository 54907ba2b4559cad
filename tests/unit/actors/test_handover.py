"""A rollout cut short on one actor is gone on from on another, exactly, or begun anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from actors.engines.base import GenerationChunk, GenerationRequest, StopReason
from actors.handover import HandoverMismatch, Recorded
from actors.render import Renderer
from actors.rollout import Player, Progress
from environments.base import StepResult
from penstock.codec import checksum, lease_from_wire, lease_to_wire, partial_to_wire
from penstock.quickstart.policy import character_tokenizer
from penstock.trajectory import (
    FinishReason,
    Lease,
    Partial,
    PolicyVersion,
    Sampling,
    Task,
    Trajectory,
    VersionSpan,
)

from .fakes import ScriptedClient, ScriptedEngine, chunk, done, says

TOKENIZER = character_tokenizer("abcdefgh=")
EOS = TOKENIZER.eos_token_id
OLD, NEW = PolicyVersion(1, 0), PolicyVersion(1, 1)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def lease(partial: Partial | None = None, *, max_tokens: int = 12) -> Lease:
    return Lease(
        lease_id="4.2.1",
        group_id=4,
        slot=2,
        attempt=1,
        task=Task("words", "train", 0, 9),
        sampling=Sampling(max_tokens=max_tokens),
        progress_timeout_seconds=60.0,
        partial=partial,
    )


class StallingEngine(ScriptedEngine):
    """Writes its chunks, then nothing more of the last turn."""

    def __init__(self, turns: Sequence[Sequence[GenerationChunk]]) -> None:
        super().__init__(turns)
        self.stalled = asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        async for made in super().generate(request):
            yield made
        if not self.turns:
            self.stalled.set()
            await asyncio.Event().wait()


def player(engine: ScriptedEngine, client: ScriptedClient) -> Player:
    return Player(engine, Renderer(TOKENIZER), client, truncation_reward=-1.0)  # type: ignore[arg-type]


async def cut_short(
    turns: Sequence[Sequence[GenerationChunk]], results: Sequence[StepResult], given: Partial | None = None
) -> Partial | None:
    """Plays until the engine stalls, and is cancelled."""
    engine, progress = StallingEngine(turns), Progress()
    client = ScriptedClient("abc=", results, max_turns=3)
    task = asyncio.create_task(player(engine, client).play(lease(given), "run.4.2", progress))
    async with asyncio.timeout(30.0):
        await engine.stalled.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.num_open == 0
    return progress.partial


async def go_on(
    partial: Partial | None,
    turns: Sequence[Sequence[GenerationChunk]],
    results: Sequence[StepResult],
    *,
    prompt: str = "abc=",
) -> tuple[Trajectory, ScriptedEngine, ScriptedClient]:
    engine = ScriptedEngine(turns)
    client = ScriptedClient(prompt, results, max_turns=3)
    trajectory = await player(engine, client).play(lease(partial), "run.4.2", Progress())
    return trajectory, engine, client


async def test_a_turn_cut_short_is_gone_on_from_its_last_token():
    partial = await cut_short([[chunk(*ids("cb"), version=OLD)]], [])
    assert partial is not None
    ending = [chunk(*ids("a"), EOS, version=NEW, stop=StopReason.STOP)]
    trajectory, engine, client = await go_on(partial, [ending], [done(1.0)])
    assert engine.requests[0].prompt_ids.tolist() == ids("abc=cb")
    assert engine.requests[0].sampling.max_tokens == 12 - 2, "what was sampled counts"
    assert client.actions == ["cba"], "the environment reads the whole turn"
    assert trajectory.token_ids.tolist() == [*ids("abc=cba"), EOS]
    assert trajectory.versions == (VersionSpan(OLD, 2), VersionSpan(NEW, 2)), "each token keeps its version"
    np.testing.assert_allclose(trajectory.logprobs[4:], [-0.1 * i for i in [*ids("cba"), EOS]], rtol=1e-6)
    assert (trajectory.num_turns, trajectory.finish_reason) == (1, FinishReason.DONE)


async def two_turns_cut_short() -> Partial:
    first = [chunk(*ids("a"), EOS, version=OLD, stop=StopReason.STOP)]
    partial = await cut_short([first, [chunk(*ids("b"), version=NEW)]], [says("h=")])
    assert partial is not None
    return partial


async def test_finished_turns_are_played_to_the_environment_again():
    partial = await two_turns_cut_short()
    assert partial.num_turns == 1
    ending = [chunk(*ids("c"), EOS, version=NEW, stop=StopReason.STOP)]
    trajectory, engine, client = await go_on(partial, [ending], [says("h="), done(1.0)])
    assert client.actions == ["a", "bc"]
    assert len(engine.requests) == 1, "no token is sampled again"
    assert trajectory.token_ids.tolist() == [*ids("abc=a"), EOS, *ids("h=bc"), EOS]
    assert trajectory.loss_mask.tolist() == [0] * 4 + [1] * 2 + [0] * 2 + [1] * 3
    assert trajectory.versions == (VersionSpan(OLD, 2), VersionSpan(NEW, 3))
    assert trajectory.num_turns == 2


@pytest.mark.parametrize(
    ("prompt", "results"),
    [
        ("abd=", [done(1.0)]),
        ("abc=", [says("g="), done(1.0)]),
        ("abc=", [done(1.0), done(1.0)]),
    ],
    ids=["another first observation", "another observation", "an earlier end"],
)
async def test_an_environment_that_answers_otherwise_begins_anew(prompt: str, results: list[StepResult]):
    partial = await two_turns_cut_short()
    anew = [chunk(*ids("d"), EOS, version=NEW, stop=StopReason.STOP)]
    results = [*results[:-1], done(0.5)] if prompt == "abd=" else [results[0], done(0.5)]
    trajectory, _, client = await go_on(partial, [anew], results, prompt=prompt)
    assert trajectory.token_ids.tolist() == [*ids(prompt), *ids("d"), EOS]
    assert trajectory.versions == (VersionSpan(NEW, 2),)
    assert (trajectory.num_turns, trajectory.reward.value) == (1, 0.5)
    assert [name for name, _, _ in client.sessions] == ["run.4.2", "run.4.2.anew"]


async def test_a_rollout_is_handed_over_twice():
    partial = await cut_short([[chunk(*ids("c"), version=OLD)]], [])
    again = await cut_short([[chunk(*ids("b"), version=NEW)]], [], given=partial)
    assert again is not None
    assert again.token_ids.tolist() == ids("abc=cb")
    assert again.versions == (VersionSpan(OLD, 1), VersionSpan(NEW, 1))


async def test_a_rollout_that_sampled_nothing_leaves_nothing():
    assert await cut_short([[]], []) is None


async def test_a_turn_whose_end_token_was_sampled_is_not_gone_on_from():
    """The end token came in one chunk, and the news that the turn is over would have come in the next."""
    partial = await cut_short([[chunk(*ids("cb"), EOS)]], [])
    trajectory, engine, client = await go_on(partial, [], [done(1.0)])
    assert not engine.requests
    assert client.actions == ["cb"]
    assert trajectory.finish_reason is FinishReason.DONE


def test_a_partial_rollout_crosses_the_wire_whole_or_not_at_all():
    partial = Partial(
        token_ids=np.array([1, 2, 3], dtype=np.int32),
        loss_mask=np.array([0, 1, 1], dtype=np.uint8),
        logprobs=np.array([0, -0.5, -0.25], dtype=np.float32),
        versions=(VersionSpan(OLD, 1), VersionSpan(NEW, 1)),
        num_turns=0,
        cut=False,
        environment_version="1",
        environment_digest="ab",
        observation_digest="cd",
    )
    message = lease_to_wire(lease())
    message.partial = partial_to_wire(partial).SerializeToString()
    message.partial_checksum = checksum(message.partial)
    received = lease_from_wire(message).partial
    assert received is not None
    np.testing.assert_array_equal(received.token_ids, partial.token_ids)
    assert received.versions == partial.versions
    message.partial_checksum ^= 1
    assert lease_from_wire(message).partial is None, "bytes that changed on the way are not gone on from"


def test_turns_that_run_into_each_other_cannot_be_told_apart():
    recorded = Recorded(
        Partial(
            token_ids=np.array([1, 2, 3], dtype=np.int32),
            loss_mask=np.array([1, 1, 0], dtype=np.uint8),
            logprobs=np.zeros(3, dtype=np.float32),
            versions=(VersionSpan(OLD, 2),),
            num_turns=1,
            cut=False,
            environment_version="1",
            environment_digest="ab",
            observation_digest="cd",
        )
    )
    with pytest.raises(HandoverMismatch):
        recorded.check_observation(np.array([1, 2], dtype=np.int32))


def test_a_lease_without_a_partial_is_played_as_ever():
    assert Recorded(None).next_turn() is None
    assert Recorded(None).is_over
    assert lease_from_wire(lease_to_wire(replace(lease(), partial=None))).partial is None
