"""Packed evaluation against each sequence alone; what cannot be packed falls back, exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MambaConfig, PreTrainedConfig

from learner.training.model import load_policy
from learner.training.packing import TokenSequence, pack
from learner.training.policy import Policy, RowForm
from tests.tiny_policy import write_tiny_policy

CPU = torch.device("cpu")
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_sequences(lengths: list[int]) -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    sequences = []
    for length in lengths:
        loss_mask = np.zeros(length, dtype=np.uint8)
        loss_mask[length // 3 :] = 1
        token_ids = generator.integers(3, 40, length).astype(np.int32)
        sequences.append(TokenSequence(token_ids=token_ids, loss_mask=loss_mask))
    return sequences


def score_alone(policy: Policy, sequence: TokenSequence, temperature: float) -> torch.Tensor:
    """[S]: the plainest way: the whole model on one sequence."""
    token_ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
    logits = policy.causal_lm(
        input_ids=token_ids[None], use_cache=False, **alone_kwargs(policy, token_ids)
    ).logits
    logprobs = (logits[0, :-1].float() / temperature).log_softmax(-1)
    scores = logprobs.gather(1, token_ids[1:, None])[:, 0]
    return scores[torch.from_numpy(sequence.loss_mask[1:].astype(bool))]


def alone_kwargs(policy: Policy, token_ids: torch.Tensor) -> dict[str, object]:
    """Our attention insists on a layout: one sequence."""
    if policy.evaluation.form is RowForm.PADDED:
        return {}
    from learner.training.attention import RowLayout

    return {"row_layout": RowLayout([len(token_ids)], CPU)}


def assert_rows_equal_sequences_alone(policy: Policy) -> None:
    sequences = make_sequences([17, 17, 16, 9, 4, 2, 30])
    scores = policy(pack(sequences, range(7), CPU), temperature=0.8)
    order = sorted(range(7), key=lambda index: (-sequences[index].num_tokens, index))
    expected = torch.cat([score_alone(policy, sequences[index], 0.8) for index in order])
    torch.testing.assert_close(scores.logprobs_S, expected, rtol=1e-5, atol=1e-5)
    scores.logprobs_S.mean().backward()
    packed = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    expected.mean().backward()
    for got, parameter in zip(packed, policy.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_row_scores_like_its_sequences_alone(tmp_path: Path, tied: bool) -> None:
    policy = load_policy(write_tiny_policy(tmp_path, tied=tied))
    assert policy.evaluation.form is RowForm.PACKED
    assert_rows_equal_sequences_alone(policy)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    policy = load_policy(write_tiny_policy(tmp_path), activation_checkpointing=True)
    assert_rows_equal_sequences_alone(policy)


def write_model(folder: Path, config: PreTrainedConfig) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


ARCHITECTURES = {
    "llama": (LlamaConfig(**TINY, num_key_value_heads=2, intermediate_size=64), RowForm.PACKED),
    "gpt2 has learned positions": (GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4), RowForm.PACKED),
    "gemma2 caps its scores": (
        Gemma2Config(**TINY, num_key_value_heads=2, head_dim=8, intermediate_size=64),
        RowForm.PADDED,
    ),
    "mamba has a recurrent state": (
        MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4),
        RowForm.PADDED,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_packed_only_where_that_is_exact(tmp_path: Path, name: str) -> None:
    config, form = ARCHITECTURES[name]
    policy = load_policy(write_model(tmp_path, config))
    assert policy.evaluation.form is form
    assert_rows_equal_sequences_alone(policy)


def test_a_cap_on_the_logits_is_not_lost(tmp_path: Path) -> None:
    config = Gemma2Config(
        **TINY, num_key_value_heads=2, head_dim=8, intermediate_size=64, final_logit_softcapping=0.01
    )
    policy = load_policy(write_model(tmp_path, config))
    assert not policy.evaluation.split_head
    assert_rows_equal_sequences_alone(policy)
