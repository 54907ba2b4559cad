import numpy as np
import pytest

from actors.engines.base import StopReason
from actors.render import Renderer
from actors.rollout import Player, Progress
from environments.base import StepResult
from penstock.errors import EngineFault, EnvironmentFault, EnvironmentFull, FaultKind
from penstock.quickstart.policy import character_tokenizer
from penstock.trajectory import (
    FinishReason,
    Lease,
    PolicyVersion,
    Reward,
    RewardStatus,
    Sampling,
    Task,
    VersionSpan,
)

from .fakes import ScriptedClient, ScriptedEngine, chunk, done, says

TOKENIZER = character_tokenizer("abcdefgh=")
EOS = TOKENIZER.eos_token_id
OLD, NEW = PolicyVersion(1, 0), PolicyVersion(1, 1)


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def lease(max_tokens: int = 8) -> Lease:
    return Lease(
        lease_id="4.2.1",
        group_id=4,
        slot=2,
        attempt=1,
        task=Task("words", "train", 0, 9),
        sampling=Sampling(max_tokens=max_tokens),
        progress_timeout_seconds=60.0,
    )


def player(engine: ScriptedEngine, client: ScriptedClient, **options: float) -> Player:
    return Player(engine, Renderer(TOKENIZER), client, **options)  # type: ignore[arg-type]


async def test_an_episode_of_one_turn():
    engine = ScriptedEngine([[chunk(*ids("cba"), EOS, stop=StopReason.STOP)]])
    client = ScriptedClient("abc=", [done(1.0)])
    progress = Progress()
    trajectory = await player(engine, client).play(lease(), "run.4.2", progress)
    assert client.actions == ["cba"], "special tokens are not part of what the policy said"
    assert trajectory.token_ids.tolist() == [*ids("abc="), *ids("cba"), EOS]
    assert trajectory.loss_mask.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(
        trajectory.logprobs[4:], [-0.1 * token for token in [*ids("cba"), EOS]], rtol=1e-6
    )
    assert trajectory.versions == (VersionSpan(OLD, 4),)
    assert trajectory.reward == Reward.valid(1.0)
    assert trajectory.finish_reason is FinishReason.DONE
    assert (trajectory.environment_version, trajectory.environment_digest) == ("3", "ab")
    assert client.sessions == [("run.4.2", 2, lease().task)], "the attempt fences the session"
    assert (progress.num_tokens, progress.num_turns) == (4, 1)
    assert client.num_open == 0


async def test_versions_are_recorded_token_by_token():
    chunks = [chunk(*ids("cb")), chunk(*ids("a"), EOS, version=NEW, stop=StopReason.STOP)]
    trajectory = await player(ScriptedEngine([chunks]), ScriptedClient("abc=", [done(0.0)])).play(
        lease(), "s", Progress()
    )
    assert trajectory.versions == (VersionSpan(OLD, 2), VersionSpan(NEW, 2))
    assert trajectory.is_mixed


async def test_turns_are_joined_without_tokenising_what_was_sampled_again():
    engine = ScriptedEngine(
        [[chunk(*ids("a"), EOS, stop=StopReason.STOP)], [chunk(*ids("bb"), EOS, stop=StopReason.STOP)]]
    )
    client = ScriptedClient("ab=", [says("cd="), done(0.5)], max_turns=2)
    trajectory = await player(engine, client).play(lease(), "s", Progress())
    assert engine.requests[1].prompt_ids.tolist() == [*ids("ab="), *ids("a"), EOS, *ids("cd=")]
    assert trajectory.loss_mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert trajectory.num_turns == 2
    assert engine.requests[1].sampling.max_tokens == 6, "the budget is the episode's"


async def test_an_answer_cut_at_the_limit_is_still_scored():
    engine = ScriptedEngine([[chunk(*ids("ab"), stop=StopReason.LENGTH)]])
    trajectory = await player(engine, ScriptedClient("ab=", [done(0.0)])).play(lease(2), "s", Progress())
    assert trajectory.finish_reason is FinishReason.LENGTH
    assert trajectory.reward.value == 0.0


async def test_an_episode_that_never_came_to_its_reward_has_none():
    engine = ScriptedEngine([[chunk(*ids("ab"), stop=StopReason.LENGTH)]])
    with pytest.raises(EnvironmentFault, match="max_tokens") as caught:
        await player(engine, ScriptedClient("ab=", [says("?")], max_turns=3)).play(lease(2), "s", Progress())
    assert caught.value.kind is FaultKind.DATA


async def test_a_truncated_episode_may_be_given_a_reward_by_configuration():
    engine = ScriptedEngine([[chunk(*ids("ab"), stop=StopReason.LENGTH)]])
    client = ScriptedClient("ab=", [says("c")], max_turns=3)
    trajectory = await player(engine, client, truncation_reward=-1.0).play(lease(2), "s", Progress())
    assert trajectory.reward == Reward.valid(-1.0)
    assert trajectory.loss_mask[-1] == 0 or trajectory.num_sampled == 2


@pytest.mark.parametrize("status", [RewardStatus.UNSCORABLE, RewardStatus.NOT_YET])
async def test_an_end_without_a_valid_reward_is_a_fault(status: RewardStatus):
    engine = ScriptedEngine([[chunk(EOS, stop=StopReason.STOP)]])
    client = ScriptedClient("ab=", [StepResult(done=True, reward=Reward(status=status))])
    with pytest.raises(EnvironmentFault):
        await player(engine, client).play(lease(), "s", Progress())


async def test_an_environment_that_does_not_end_is_at_fault():
    engine = ScriptedEngine([[chunk(EOS, stop=StopReason.STOP)]] * 3)
    client = ScriptedClient("ab=", [says("c")] * 3, max_turns=2)
    with pytest.raises(EnvironmentFault, match="not done after 2 turns"):
        await player(engine, client).play(lease(), "s", Progress())


async def test_generation_that_was_aborted_is_an_engine_fault():
    engine = ScriptedEngine([[chunk(*ids("a"), stop=StopReason.ABORTED)]])
    client = ScriptedClient("ab=", [done(1.0)])
    with pytest.raises(EngineFault):
        await player(engine, client).play(lease(), "s", Progress())
    assert client.actions == []
    assert client.num_open == 0, "the session is closed all the same"


async def test_an_environment_that_came_back_is_described_anew():
    client = ScriptedClient("ab=", [EnvironmentFault("gone"), done(1.0)])
    plays = player(ScriptedEngine([[chunk(EOS, stop=StopReason.STOP)]] * 2), client)
    with pytest.raises(EnvironmentFault):
        await plays.play(lease(), "s", Progress())
    object.__setattr__(client.description, "version", "4")
    trajectory = await plays.play(lease(), "s", Progress())
    assert trajectory.environment_version == "4"


async def test_a_prompt_that_leaves_nothing_to_sample_is_a_data_fault_and_not_the_end_of_the_actor():
    engine = ScriptedEngine([])
    engine.max_context = 4
    with pytest.raises(EnvironmentFault, match=r"the prompt has 4 tokens.*a context of 4") as caught:
        await player(engine, ScriptedClient("abc=", [])).play(lease(), "s", Progress())
    assert caught.value.kind is FaultKind.DATA
    assert engine.requests == []


async def test_an_observation_that_does_not_fit_ends_the_episode_and_is_left_out():
    engine = ScriptedEngine([[chunk(*ids("a"), EOS, stop=StopReason.STOP)]])
    engine.max_context = 8
    client = ScriptedClient("ab=", [says("abcdefgh" * 4)], max_turns=3)
    trajectory = await player(engine, client, truncation_reward=0.0).play(lease(), "s", Progress())
    assert trajectory.token_ids.tolist() == [*ids("ab="), *ids("a"), EOS]
    assert trajectory.finish_reason is FinishReason.LENGTH


async def test_an_environment_that_was_full_keeps_its_number_of_sessions():
    client = ScriptedClient("ab=", [EnvironmentFull("no room")])
    object.__setattr__(client.description, "max_sessions", 8)
    plays = player(ScriptedEngine([[chunk(EOS, stop=StopReason.STOP)]]), client)
    assert plays.max_sessions is None
    with pytest.raises(EnvironmentFull):
        await plays.play(lease(), "s", Progress())
    assert plays.max_sessions == 8
