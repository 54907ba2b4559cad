"""Continuous batching, step by step in one thread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.engines import decoder as decoder_module
from actors.engines.base import GenerationChunk, StopReason
from actors.engines.decoder import Decoder, Emission, Running
from actors.engines.policy import build_model, load_architecture
from actors.engines.sampling import SamplingBatch, sample
from actors.engines.tensors import plan_update
from penstock.trajectory import InstallMode, PolicyVersion
from tests.conformance.engine_suite import prompt, request
from tests.conformance.policies import Policy, configs, write_policy

FIRST = PolicyVersion(1, 0)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return write_policy(tmp_path / "policy", configs()["qwen3-tied"])


def make_decoder(policy: Policy, *, num_slots: int = 4, max_context: int = 64) -> Decoder:
    architecture = load_architecture(policy.folder)
    model = build_model(architecture, torch.device("cpu"), torch.float32)
    plan_update(model, policy.stage(FIRST)).apply()
    decoder = Decoder(model, architecture, num_slots=num_slots, max_context=max_context)
    decoder.switch_version(FIRST)
    return decoder


def submit(decoder: Decoder, length: int, *, limit: int, seed: int = 1) -> Running:
    sequence = Running(request(prompt(length, seed)), seed=seed, limit=limit)
    decoder.submit(sequence)
    return sequence


def run(decoder: Decoder) -> dict[Running, list[GenerationChunk]]:
    """Until nothing is left."""
    ended: dict[Running, list[GenerationChunk]] = {}
    while decoder.has_work:
        for emission in [*decoder.prefill(), *decoder.decode()]:
            ended.setdefault(emission.sequence, []).extend(emission.chunks)
    return ended


def tokens_of(chunks: list[GenerationChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def logprobs_of(chunks: list[GenerationChunk]) -> list[float]:
    return [logprob for chunk in chunks for logprob in chunk.logprobs]


def only(emissions: list[Emission]) -> Emission:
    (emission,) = emissions
    return emission


def test_a_few_that_wait_are_prefilled_together_but_wait_no_longer_than_some_steps(policy: Policy) -> None:
    decoder = make_decoder(policy, num_slots=20)
    for _ in range(16):
        submit(decoder, 5, limit=30)
    decoder.prefill()
    assert decoder.num_running == 16
    submit(decoder, 5, limit=30)
    decoder.prefill()
    assert decoder.num_waiting == 1, "one is few beside sixteen"
    submit(decoder, 5, limit=30)
    decoder.prefill()
    assert decoder.num_waiting == 0, "two are an eighth of them"
    submit(decoder, 5, limit=30)
    num_steps = 0
    while decoder.num_waiting:
        decoder.prefill()
        decoder.decode()
        num_steps += 1
    assert num_steps == 4


def test_who_waits_for_the_last_free_slot_is_not_few(policy: Policy) -> None:
    decoder = make_decoder(policy, num_slots=17)
    for _ in range(16):
        submit(decoder, 5, limit=30)
    decoder.prefill()
    for _ in range(2):
        submit(decoder, 5, limit=30)
    decoder.prefill()
    assert (decoder.num_running, decoder.num_waiting) == (17, 1)


def test_a_sequence_is_prefilled_then_decoded(policy: Policy) -> None:
    decoder = make_decoder(policy)
    sequence = submit(decoder, 5, limit=3)
    assert decoder.num_waiting == 1
    assert decoder.prefill() == []
    assert (decoder.num_waiting, decoder.num_running, decoder.num_sampled) == (0, 1, 1)
    assert decoder.decode() == []
    emission = only(decoder.decode())
    assert emission.sequence is sequence
    assert len(tokens_of(list(emission.chunks))) == 3
    assert emission.chunks[-1].stop_reason is StopReason.LENGTH
    assert decoder.num_running == 0
    assert not decoder.has_work


def test_nothing_runs_without_a_version(policy: Policy) -> None:
    decoder = make_decoder(policy)
    decoder.version = None
    submit(decoder, 5, limit=3)
    assert not decoder.has_work


def test_slots_are_filled_in_order_of_arrival(policy: Policy) -> None:
    decoder = make_decoder(policy, num_slots=2)
    sequences = [submit(decoder, 3, limit=2 + index, seed=index + 1) for index in range(5)]
    ended = run(decoder)
    assert list(ended) == sequences


def test_sequences_are_moved_into_free_slots_and_go_on_undisturbed(policy: Policy) -> None:
    decoder = make_decoder(policy)
    sequences = [submit(decoder, 3 + index, limit=limit) for index, limit in enumerate([2, 30, 4, 40])]
    ended = run(decoder)
    for index, sequence in enumerate(sequences):
        chunks = ended[sequence]
        expected = policy.logprobs(prompt(3 + index, 1), tokens_of(chunks))
        assert logprobs_of(chunks) == pytest.approx(expected, abs=1e-4)


def test_equal_prompts_are_prefilled_once_and_sampled_apart(policy: Policy) -> None:
    decoder = make_decoder(policy)
    sequences = []
    for seed in range(4):
        sequence = Running(request(prompt(6, 9 if seed < 3 else 8)), seed=seed + 1, limit=12)
        decoder.submit(sequence)
        sequences.append(sequence)
    forward, seen = decoder._model.forward, []

    def watched(**arguments: torch.Tensor) -> object:
        seen.append(tuple(arguments["input_ids"].shape))
        return forward(**arguments)

    decoder._model.forward = watched  # type: ignore[method-assign]
    ended = run(decoder)
    assert seen[0] == (2, 6)
    assert len({tuple(tokens_of(ended[sequence])) for sequence in sequences[:3]}) == 3
    for sequence in sequences:
        chunks = ended[sequence]
        expected = policy.logprobs(sequence.request.prompt_ids, tokens_of(chunks))
        assert logprobs_of(chunks) == pytest.approx(expected, abs=1e-4)


def test_a_long_prompt_is_prefilled_apart_from_short_ones(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.engines.decoder._PREFILL_TOKENS", 20)
    decoder = make_decoder(policy, num_slots=8)
    for length in (5, 5, 40, 4):
        submit(decoder, length, limit=20)
    running = []
    while decoder.num_waiting:
        decoder.prefill()
        running.append(decoder.num_running)
    assert running == [2, 3, 4]


def test_flushed_chunks_join_to_the_whole_and_each_token_is_sent_once(policy: Policy) -> None:
    decoder = make_decoder(policy)
    sequence = submit(decoder, 4, limit=9)
    chunks: list[GenerationChunk] = []
    while decoder.has_work:
        ended = [*decoder.prefill(), *decoder.decode()]
        for emission in ended or decoder.flush():
            chunks.extend(emission.chunks)
            sequence.unread = False
    assert len(chunks) > 3
    assert logprobs_of(chunks) == pytest.approx(policy.logprobs(prompt(4, 1), tokens_of(chunks)), abs=1e-4)
    assert len(tokens_of(chunks)) == 9


def test_a_reader_that_does_not_read_gets_one_flush_and_then_the_end(policy: Policy) -> None:
    decoder = make_decoder(policy)
    submit(decoder, 4, limit=9)
    decoder.prefill()
    assert len(decoder.flush()) == 1
    flushed = 0
    emissions: list[Emission] = []
    while not emissions:
        emissions = decoder.decode()
        flushed += len(decoder.flush())
    assert flushed == 0
    assert len(tokens_of(list(only(emissions).chunks))) == 8


def test_every_chunk_is_of_one_version(policy: Policy) -> None:
    decoder = make_decoder(policy)
    submit(decoder, 4, limit=7)
    decoder.prefill()
    emissions: list[Emission] = []
    for step in range(1, 7):
        if step in (2, 3, 5):
            decoder.switch_version(PolicyVersion(1, step))
        emissions += decoder.decode()
    chunks = only(emissions).chunks
    assert [(str(chunk.version), len(chunk.token_ids)) for chunk in chunks] == [
        ("1.0", 2), ("1.2", 1), ("1.3", 2), ("1.5", 2),
    ]  # fmt: skip
    assert [chunk.stop_reason for chunk in chunks] == [None, None, None, StopReason.LENGTH]


def test_two_switches_between_the_same_tokens_leave_the_last(policy: Policy) -> None:
    decoder = make_decoder(policy)
    submit(decoder, 4, limit=3)
    decoder.prefill()
    decoder.switch_version(PolicyVersion(1, 1))
    decoder.switch_version(PolicyVersion(1, 2))
    decoder.decode()
    chunks = only(decoder.decode()).chunks
    assert [(chunk.version.step, len(chunk.token_ids)) for chunk in chunks] == [(0, 1), (2, 2)]


def test_abandoned_sequences_are_dropped_wherever_they_are(policy: Policy) -> None:
    decoder = make_decoder(policy, num_slots=2)
    running, kept, waiting = (submit(decoder, 3, limit=6, seed=seed) for seed in (1, 2, 3))
    decoder.prefill()
    decoder.abandon(running)
    decoder.abandon(waiting)
    ended = run(decoder)
    assert list(ended) == [kept]
    decoder.abandon(kept)
    expected = policy.logprobs(prompt(3, 2), tokens_of(ended[kept]))
    assert logprobs_of(ended[kept]) == pytest.approx(expected, abs=1e-4)


def test_aborting_hands_over_what_was_sampled(policy: Policy) -> None:
    decoder = make_decoder(policy, num_slots=1)
    running, waiting = submit(decoder, 3, limit=9), submit(decoder, 3, limit=9, seed=2)
    decoder.prefill()
    decoder.decode()
    ended = {emission.sequence: emission.chunks for emission in decoder.abort_all()}
    assert len(ended[running][-1].token_ids) == 2
    assert ended[waiting][-1].token_ids == ()
    assert all(chunks[-1].stop_reason is StopReason.ABORTED for chunks in ended.values())
    assert not decoder.has_work


def test_a_step_that_fails_drops_its_sequences_alone(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(policy, num_slots=2)
    failing = [submit(decoder, 3, limit=9, seed=seed) for seed in (1, 2)]
    unharmed = submit(decoder, 3, limit=4, seed=3)
    decoder.prefill()
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_model", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.decode()
    assert decoder.drop_concerned() == failing
    ended = run(decoder)
    assert list(ended) == [unharmed]
    expected = policy.logprobs(prompt(3, 3), tokens_of(ended[unharmed]))
    assert logprobs_of(ended[unharmed]) == pytest.approx(expected, abs=1e-4)


def test_random_numbers_belong_to_places_in_the_context(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later turn has a longer prompt and the same seed, and must not repeat an earlier one's luck."""
    drawn: list[list[float]] = []

    def recording(logits: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        drawn[-1].extend(batch.uniforms_B1.squeeze(-1).tolist())
        return sample(logits, batch)

    monkeypatch.setattr("actors.engines.decoder.sample", recording)
    for length in (4, 6):
        drawn.append([])
        decoder = make_decoder(policy)
        submit(decoder, length, limit=8, seed=5)
        run(decoder)
    assert len(set(drawn[0])) == 8
    assert drawn[0][2:] == drawn[1][:-2]


def test_random_traffic_keeps_every_sequence_exact(policy: Policy) -> None:
    """Arrivals, ends and abandonments at random: the survivors are as if each ran alone."""
    rng = np.random.default_rng(4)
    decoder = make_decoder(policy, num_slots=5)
    alive: list[Running] = []
    ended: dict[Running, list[GenerationChunk]] = {}
    for step in range(150):
        if rng.random() < 0.35:
            length, limit = int(rng.integers(1, 20)), int(rng.integers(1, 25))
            alive.append(submit(decoder, length, limit=limit, seed=step + 1))
        if alive and rng.random() < 0.05:
            dropped = alive.pop(int(rng.integers(len(alive))))
            if dropped not in ended:
                decoder.abandon(dropped)
        for emission in [*decoder.prefill(), *decoder.decode()]:
            ended[emission.sequence] = list(emission.chunks)
    ended |= run(decoder)
    assert len(ended) > 30
    assert set(alive) <= set(ended)
    for sequence, chunks in ended.items():
        assert len(tokens_of(chunks)) == sequence.limit
        expected = policy.logprobs(sequence.request.prompt_ids, tokens_of(chunks))
        assert logprobs_of(chunks) == pytest.approx(expected, abs=1e-4)


def test_outdated_sequences_are_read_again_in_batches_that_fit_a_prefill(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(policy)
    sequences = [submit(decoder, length, limit=12, seed=length) for length in (3, 20, 9, 4)]
    emissions = [*decoder.prefill(), *decoder.decode(), *decoder.decode()]
    abandoned = sequences.pop()
    decoder.abandon(abandoned)
    policy.perturb(seed=1)
    plan_update(decoder._model, policy.stage(PolicyVersion(1, 1))).apply()
    decoder.switch_version(PolicyVersion(1, 1), InstallMode.RECOMPUTE)
    monkeypatch.setattr(decoder_module, "_PREFILL_TOKENS", 30)
    num_batches = 0
    while decoder.has_outdated:
        decoder.recompute()
        num_batches += 1
    assert num_batches == 2
    ended = run(decoder)
    assert emissions == []
    assert set(ended) == set(sequences)
    for sequence, chunks in ended.items():
        assert [len(chunk.token_ids) for chunk in chunks] == [3, 9]
        expected = policy.logprobs(sequence.request.prompt_ids, tokens_of(chunks))
        assert logprobs_of(chunks)[3:] == pytest.approx(expected[3:], abs=1e-4)
