from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.errors import ConfigError
from penstock.quickstart.policy import make_policy


def test_a_policy_is_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "policy", seed=0, characters="abc=")

    policy = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    logits = policy(input_ids=torch.tensor([tokenizer.encode("cab=")])).logits
    assert logits.shape == (1, 4, len(tokenizer))
    assert policy.config.model_type == "qwen3"
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id
    assert policy.generation_config.pad_token_id == tokenizer.pad_token_id


def test_every_character_is_one_token_and_comes_back(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_policy(tmp_path, seed=0, characters="ab =\nü"))

    text = "a b=\nüa"
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (
        tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos_token_id], skip_special_tokens=True) == "ab"
    )
    assert tokenizer.encode("z") == [tokenizer.unk_token_id]


def test_a_chat_is_its_contents(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_policy(tmp_path, seed=0, characters="ab="))
    chat = [{"role": "user", "content": "ab="}, {"role": "assistant", "content": "ba"}]

    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "ab=ba"


def test_equal_seeds_give_equal_files_and_leave_the_global_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, other, third = (
        make_policy(tmp_path / name, seed=seed, characters="ab").joinpath("model.safetensors").read_bytes()
        for name, seed in (("one", 1), ("other", 1), ("third", 3))
    )

    assert one == other
    assert one != third
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_tied_only_if_asked_for(tmp_path: Path, tied: bool) -> None:
    policy = AutoModelForCausalLM.from_pretrained(make_policy(tmp_path, seed=0, characters="ab", tied=tied))

    shared = policy.get_input_embeddings().weight is policy.get_output_embeddings().weight
    assert shared is tied


def test_a_character_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each once"):
        make_policy(tmp_path, seed=0, characters="abca")


def test_sizes_that_do_not_divide_are_refused_with_one_that_does(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hidden_size is 100 and head_dim 32.*such as 64"):
        make_policy(tmp_path, seed=0, characters="ab", hidden_size=100)
