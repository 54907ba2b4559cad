"""What every engine must do. A test module subclasses EngineSuite and says how one is made.

The reference is transformers itself: a plain forward pass over the whole sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from actors.engines.base import Engine, GenerationChunk, GenerationRequest, StopReason
from learner.training.model import load_policy
from learner.training.packing import TokenSequence, pack
from learner.training.policy import Policy as TrainerPolicy
from penstock.errors import EngineFault, WeightTransferError
from penstock.trajectory import InstallMode, PolicyVersion, Sampling, TokenIds
from penstock.weights.manifest import HostTensor
from penstock.weights.staged import stage
from tests.conformance.policies import (
    MAX_CONTEXT,
    STOP_IDS,
    VOCAB_SIZE,
    Policy,
    configs,
    host_tensors,
    logprobs_over_versions,
    write_policy,
)

FIRST = PolicyVersion(1, 0)
SECOND = PolicyVersion(1, 1)
THIRD = PolicyVersion(1, 2)
TOLERANCE = 1e-4
DEADLINE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    token_ids: list[int]
    logprobs: list[float]
    spans: list[tuple[PolicyVersion, int]]
    stop_reason: StopReason


def prompt(length: int, seed: int = 0) -> TokenIds:
    return np.random.default_rng([length, seed]).integers(6, VOCAB_SIZE, size=length, dtype=np.int32)


def request(prompt_ids: TokenIds, *, name: str = "r", **sampling: float) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_ids=prompt_ids, sampling=Sampling(**sampling))  # type: ignore[arg-type]


async def complete(engine: Engine, wanted: GenerationRequest) -> Completion:
    """Reads a stream to its end, and checks its form."""
    chunks = [chunk async for chunk in engine.generate(wanted)]
    assert all(chunk.stop_reason is None for chunk in chunks[:-1])
    assert all(len(chunk.token_ids) == len(chunk.logprobs) for chunk in chunks)
    assert all(chunk.token_ids for chunk in chunks[:-1])
    last = chunks[-1].stop_reason
    assert last is not None
    return Completion(
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        logprobs=[logprob for chunk in chunks for logprob in chunk.logprobs],
        spans=spans_of(chunks),
        stop_reason=last,
    )


def spans_of(chunks: list[GenerationChunk]) -> list[tuple[PolicyVersion, int]]:
    spans: list[tuple[PolicyVersion, int]] = []
    for chunk in chunks:
        if spans and spans[-1][0] == chunk.version:
            spans[-1] = (chunk.version, spans[-1][1] + len(chunk.token_ids))
        else:
            spans.append((chunk.version, len(chunk.token_ids)))
    return spans


async def complete_all(engine: Engine, wanted: list[GenerationRequest]) -> list[Completion]:
    async with asyncio.timeout(DEADLINE_SECONDS), asyncio.TaskGroup() as group:
        tasks = [group.create_task(complete(engine, each)) for each in wanted]
    return [task.result() for task in tasks]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110 - an engine offers no event
            await asyncio.sleep(0.005)


class EngineSuite:
    """Subclasses define `make_engine`, and may define `running` so that tests share engines."""

    unsupported: Mapping[str, str] = {}
    """Why the engine does not run some of the configurations."""

    def make_engine(
        self, folder: Path, *, num_slots: int, max_context: int, install_mode: InstallMode
    ) -> Engine:
        """An engine that hands out tokens as soon as it has them."""
        raise NotImplementedError

    @pytest.fixture(params=sorted(configs()))
    def policy(self, request: pytest.FixtureRequest, tmp_path: Path) -> Policy:
        if request.param in self.unsupported:
            pytest.skip(self.unsupported[request.param])
        return write_policy(tmp_path / "policy", configs()[request.param])

    @pytest.fixture
    def qwen(self, tmp_path: Path) -> Policy:
        return write_policy(tmp_path / "policy", configs()["qwen3-tied"])

    @contextlib.asynccontextmanager
    async def running(
        self,
        policy: Policy,
        *,
        num_slots: int = 8,
        max_context: int = MAX_CONTEXT,
        install_mode: InstallMode = InstallMode.KEEP,
        install: bool = True,
    ) -> AsyncIterator[Engine]:
        engine = self.make_engine(
            policy.folder, num_slots=num_slots, max_context=max_context, install_mode=install_mode
        )
        try:
            await engine.start()
            if install:
                await engine.install(policy.stage(FIRST))
            yield engine
        finally:
            await engine.stop()

    async def test_one_request_is_completed(self, qwen: Policy) -> None:
        async with self.running(qwen) as engine:
            done = await complete(engine, request(prompt(5), max_tokens=7))
        assert len(done.token_ids) == 7
        assert done.spans == [(FIRST, 7)]
        assert done.stop_reason is StopReason.LENGTH

    async def test_logprobs_equal_a_plain_forward_pass(self, policy: Policy) -> None:
        prompts = [
            prompt(length, seed) for seed, length in enumerate([1, 2, 3, 5, 8, 13, 21, 34, 4, 4, 17, 9])
        ]
        wanted = [
            request(ids, max_tokens=1 + 5 * (index % 5), seed=index + 1) for index, ids in enumerate(prompts)
        ]
        async with self.running(policy, num_slots=5) as engine:
            completions = await complete_all(engine, wanted)
        for ids, done in zip(prompts, completions, strict=True):
            assert done.logprobs == pytest.approx(policy.logprobs(ids, done.token_ids), abs=TOLERANCE)

    async def test_greedy_tokens_equal_those_of_transformers(self, policy: Policy) -> None:
        prompts = [prompt(length, 7) for length in (1, 4, 9, 16, 16, 25)]
        async with self.running(policy, num_slots=4) as engine:
            completions = await complete_all(
                engine, [request(ids, max_tokens=20, temperature=0.0) for ids in prompts]
            )
        for ids, done in zip(prompts, completions, strict=True):
            assert done.token_ids == policy.greedy(ids, 20)
            assert done.logprobs == pytest.approx(policy.logprobs(ids, done.token_ids), abs=TOLERANCE)

    async def test_logprobs_hold_under_the_sampling_settings(self, qwen: Policy) -> None:
        settings = [
            {"temperature": 0.7},
            {"temperature": 1.3, "top_k": 5},
            {"top_p": 0.8},
            {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
            {"top_k": 1},
            {},
        ]
        ids = prompt(6)
        wanted = [
            request(ids, max_tokens=30, seed=seed + 1, **each)
            for seed, each in enumerate(settings)  # type: ignore[arg-type]
        ]
        async with self.running(qwen) as engine:
            completions = await complete_all(engine, wanted)
        for each, done in zip(settings, completions, strict=True):
            expected = _warped_logprobs(qwen, ids, done.token_ids, each)
            assert done.logprobs == pytest.approx(expected, abs=TOLERANCE)

    async def test_a_seed_gives_the_same_tokens_whatever_else_runs(self, qwen: Policy) -> None:
        seeded = request(prompt(6), max_tokens=40, seed=1234)
        others = [request(prompt(3 + index, index), max_tokens=10 + index) for index in range(12)]
        async with self.running(qwen, num_slots=6) as engine:
            alone = await complete(engine, seeded)
            amid = (await complete_all(engine, [*others[:5], seeded, *others[5:]]))[5]
        assert amid.token_ids == alone.token_ids

    async def test_without_a_seed_completions_differ(self, qwen: Policy) -> None:
        async with self.running(qwen) as engine:
            completions = await complete_all(engine, [request(prompt(6), max_tokens=40) for _ in range(4)])
        assert len({tuple(done.token_ids) for done in completions}) == 4

    async def test_a_stop_token_ends_a_turn_and_is_its_last(self, tmp_path: Path) -> None:
        config = configs()["qwen3-untied"]
        config.eos_token_id = list(STOP_IDS)
        policy = write_policy(tmp_path / "policy", config)
        async with self.running(policy) as engine:
            completions = await complete_all(
                engine, [request(prompt(4, seed), max_tokens=300, seed=seed + 1) for seed in range(40)]
            )
        ended = [done for done in completions if done.stop_reason is StopReason.STOP]
        assert {done.token_ids[-1] for done in ended} == set(STOP_IDS)
        for done in completions:
            early = done.token_ids[:-1] if done.stop_reason is StopReason.STOP else done.token_ids
            assert not set(early) & set(STOP_IDS)

    async def test_the_context_bounds_prompt_and_completion_together(self, qwen: Policy) -> None:
        async with self.running(qwen, max_context=16) as engine:
            limit = engine.max_context
            ids = prompt(limit - 13)
            completions = await complete_all(
                engine, [request(each, max_tokens=100) for each in (ids, prompt(limit - 1), prompt(limit))]
            )
        assert [len(done.token_ids) for done in completions] == [13, 1, 0]
        assert {done.stop_reason for done in completions} == {StopReason.LENGTH}
        assert completions[0].logprobs == pytest.approx(
            qwen.logprobs(ids, completions[0].token_ids), abs=TOLERANCE
        )

    async def test_more_requests_than_slots_all_complete(self, qwen: Policy) -> None:
        async with self.running(qwen, num_slots=2) as engine:
            before = engine.stats().num_tokens
            completions = await complete_all(
                engine,
                [request(prompt(1 + index % 4, index), max_tokens=1 + index % 6) for index in range(30)],
            )
            stats = engine.stats()
        assert [len(done.token_ids) for done in completions] == [1 + index % 6 for index in range(30)]
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_tokens - before == sum(len(done.token_ids) for done in completions)

    async def test_prompts_that_cannot_be_read_are_refused(self, qwen: Policy) -> None:
        async with self.running(qwen) as engine:
            for bad in ([], [VOCAB_SIZE], [-1]):
                with pytest.raises(EngineFault, match="prompt"):
                    await complete(engine, request(np.array(bad, dtype=np.int32)))
            done = await complete(engine, request(prompt(3), max_tokens=2))
        assert len(done.token_ids) == 2

    async def test_a_request_waits_for_the_first_install(self, qwen: Policy) -> None:
        async with self.running(qwen, install=False) as engine, asyncio.TaskGroup() as group:
            assert engine.installed is None
            waiting = group.create_task(complete(engine, request(prompt(4), max_tokens=3)))
            await until(lambda: engine.stats().num_waiting == 1)
            assert not waiting.done()
            report = await engine.install(qwen.stage(FIRST))
            assert (await waiting).spans == [(FIRST, 3)]
            assert report.version == engine.installed == FIRST
            assert report.digest == qwen.stage(FIRST).manifest.digest

    async def test_an_install_in_mid_sequence_switches_between_two_tokens(self, policy: Policy) -> None:
        versions = _three_versions(policy)
        ids = [prompt(length, 3) for length in (2, 5, 9, 9)]
        completions = await self._install_amid(versions, ids, InstallMode.KEEP)
        for prompt_ids, done in zip(ids, completions, strict=True):
            expected = logprobs_over_versions(
                prompt_ids,
                done.token_ids,
                [(versions[version].model, count) for version, count in done.spans],
            )
            assert done.logprobs == pytest.approx(expected, abs=TOLERANCE)

    async def test_recomputed_sequences_owe_nothing_to_older_versions(self, qwen: Policy) -> None:
        versions = _three_versions(qwen)
        ids = [prompt(length, 3) for length in (2, 140, 9, 9)]
        completions = await self._install_amid(versions, ids, InstallMode.RECOMPUTE)
        for prompt_ids, done in zip(ids, completions, strict=True):
            by_version = {
                version: each.logprobs(prompt_ids, done.token_ids) for version, each in versions.items()
            }
            start = 0
            for (version, count), older in zip(done.spans, (None, FIRST, SECOND), strict=True):
                span = slice(start, start + count)
                assert done.logprobs[span] == pytest.approx(by_version[version][span], abs=TOLERANCE)
                if older is not None:
                    assert abs(done.logprobs[start] - by_version[older][start]) > TOLERANCE
                start += count

    async def _install_amid(
        self, versions: Mapping[PolicyVersion, Policy], ids: list[TokenIds], mode: InstallMode
    ) -> list[Completion]:
        """Installs two versions while sequences run; tries until both fall into the middle of each."""
        limit = MAX_CONTEXT - max(each.size for each in ids)
        for _ in range(10):
            async with (
                self.running(versions[FIRST], install_mode=mode) as engine,
                asyncio.TaskGroup() as group,
            ):
                tasks = [
                    group.create_task(complete(engine, request(each, max_tokens=limit, seed=9 + index)))
                    for index, each in enumerate(ids)
                ]
                for version in (SECOND, THIRD):
                    so_far = engine.stats().num_tokens
                    await until(lambda: engine.stats().num_tokens - so_far > 4 * len(tasks))  # noqa: B023
                    await engine.install(versions[version].stage(version))
            completions = [task.result() for task in tasks]
            assert {len(done.token_ids) for done in completions} == {limit}, "a running sequence was dropped"
            if all([version for version, _ in done.spans] == [FIRST, SECOND, THIRD] for done in completions):
                return completions
        pytest.fail("no two installs fell into the middle of the sequences")

    async def test_ten_installs_leave_no_tensor_stale(self, policy: Policy) -> None:
        ids = prompt(7)
        async with self.running(policy) as engine:
            before = engine.stats().num_installs
            for step in range(1, 11):
                policy.perturb(seed=step)
                version = PolicyVersion(1, step)
                report = await engine.install(policy.stage(version))
                done = await complete(engine, request(ids, max_tokens=12, seed=step))
                assert report.version == version
                assert done.spans == [(version, 12)]
                assert done.logprobs == pytest.approx(policy.logprobs(ids, done.token_ids), abs=TOLERANCE)
            assert engine.stats().num_installs - before == 10

    @pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-untied"])
    async def test_the_trainer_gives_the_same_logprobs_before_and_after_ten_installs(
        self, name: str, tmp_path: Path
    ) -> None:
        policy = write_policy(tmp_path / "policy", configs()[name])
        policy.model.save_pretrained(tmp_path / "trained")  # type: ignore[operator]
        trainer = load_policy(tmp_path / "trained")
        trained = Policy(folder=policy.folder, model=trainer.causal_lm)
        ids = [prompt(length, length) for length in (3, 11, 20)]
        async with self.running(policy) as engine:
            for step in range(11):
                await engine.install(trained.stage(PolicyVersion(1, step)))
                if step in (0, 10):
                    wanted = [request(each, max_tokens=40, temperature=0.8, seed=5) for each in ids]
                    completions = await complete_all(engine, wanted)
                    ours = np.concatenate([done.logprobs for done in completions])
                    theirs = np.concatenate(
                        [
                            _trainer_logprobs(trainer, each, done.token_ids, temperature=0.8)
                            for each, done in zip(ids, completions, strict=True)
                        ]
                    )
                    assert np.abs(ours - theirs).mean() <= TOLERANCE
                trained.perturb(seed=step)

    async def test_a_change_of_one_tensor_shows_whichever_it_is(self, policy: Policy) -> None:
        ids = prompt(9)
        tokens = prompt(12, 1).tolist()
        async with self.running(policy) as engine:
            for step, (name, parameter) in enumerate(policy.model.named_parameters()):
                before = policy.logprobs(ids, tokens)
                with torch.no_grad():
                    parameter += 0.5 * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(step)
                    )
                assert policy.logprobs(ids, tokens) != pytest.approx(before, abs=TOLERANCE), name
                version = PolicyVersion(1, step + 1)
                await engine.install(policy.stage(version))
                done = await complete(engine, request(ids, max_tokens=12, seed=step + 1))
                expected = policy.logprobs(ids, done.token_ids)
                assert done.logprobs == pytest.approx(expected, abs=TOLERANCE), name

    async def test_an_install_that_does_not_fit_changes_nothing(self, qwen: Policy) -> None:
        ids = prompt(5)
        good = host_tensors(qwen.model)
        matrix = next(index for index, tensor in enumerate(good) if len(tensor.shape) == 2)
        turned = HostTensor(
            name=good[matrix].name,
            dtype="F32",
            shape=good[matrix].shape[::-1],
            data=good[matrix].data,
        )
        extra = HostTensor(name="surplus", dtype="F32", shape=(1,), data=np.zeros(4, dtype=np.uint8))
        zeroed = [
            HostTensor(name=each.name, dtype="F32", shape=each.shape, data=np.zeros_like(each.data))
            for each in good
        ]
        async with self.running(qwen) as engine:
            for bad in (
                [*zeroed[:matrix], turned, *zeroed[matrix + 1 :]],
                zeroed[:-1],
                [*zeroed, extra],
            ):
                with pytest.raises(WeightTransferError):
                    await engine.install(stage(SECOND, bad))
                assert engine.installed == FIRST
            done = await complete(engine, request(ids, max_tokens=10))
        assert done.spans == [(FIRST, 10)]
        assert done.logprobs == pytest.approx(qwen.logprobs(ids, done.token_ids), abs=TOLERANCE)

    async def test_closing_the_iterator_frees_the_slot(self, qwen: Policy) -> None:
        async with self.running(qwen, num_slots=1) as engine:
            stream = engine.generate(request(prompt(4), max_tokens=400))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            done = await complete(engine, request(prompt(4), max_tokens=5))
            assert len(done.token_ids) == 5
            await until(lambda: engine.stats().num_running == 0)

    async def test_stopping_ends_every_request_with_what_it_has(self, qwen: Policy) -> None:
        async with self.running(qwen, num_slots=2, install=False) as engine, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(complete(engine, request(prompt(3), max_tokens=400))) for _ in range(4)
            ]
            await until(lambda: engine.stats().num_waiting == 4)
            await engine.stop()
            await engine.stop()
            assert [(await task).stop_reason for task in tasks] == [StopReason.ABORTED] * 4
            with pytest.raises(EngineFault, match="stopped"):
                await complete(engine, request(prompt(3)))
            with pytest.raises(EngineFault, match="stopped"):
                await engine.install(qwen.stage(FIRST))


@torch.no_grad()
def _trainer_logprobs(
    trainer: TrainerPolicy, prompt_ids: TokenIds, completion: list[int], *, temperature: float
) -> NDArray[np.float32]:
    mask = np.zeros(len(prompt_ids) + len(completion), dtype=np.uint8)
    mask[len(prompt_ids) :] = 1
    sequence = TokenSequence(
        token_ids=np.concatenate([prompt_ids, np.array(completion, dtype=np.int32)]), loss_mask=mask
    )
    row = pack([sequence], [0], torch.device("cpu"))
    scores: NDArray[np.float32] = trainer(row, temperature=temperature).logprobs_S.numpy()
    return scores


def _three_versions(policy: Policy) -> dict[PolicyVersion, Policy]:
    """Each with weights of its own, for the engine of the first."""
    others = [write_policy(policy.folder, policy.model.config, seed=seed) for seed in (1, 2)]
    return dict(zip((FIRST, SECOND, THIRD), (policy, *others), strict=True))


def _warped_logprobs(
    policy: Policy, prompt_ids: TokenIds, completion: list[int], settings: dict[str, float]
) -> list[float]:
    """By transformers' own warpers."""
    logits = policy.logits(prompt_ids, completion).float()
    ids = torch.zeros(len(completion), 1, dtype=torch.int64)
    if "temperature" in settings:
        logits = TemperatureLogitsWarper(settings["temperature"])(ids, logits)
    if "top_k" in settings:
        logits = TopKLogitsWarper(int(settings["top_k"]))(ids, logits)
    if "top_p" in settings:
        logits = TopPLogitsWarper(settings["top_p"])(ids, logits)
    table = torch.log_softmax(logits, dim=-1)
    chosen: list[float] = table.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1).tolist()
    return chosen
