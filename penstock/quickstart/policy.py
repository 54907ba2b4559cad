"""A policy small enough to train on a laptop: real Hugging Face files, made in a second.

Qwen3's architecture with a tokeniser of single characters. `transformers` and vLLM
load the folder like any other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from penstock.errors import ConfigError

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"

_CONTENTS_ONLY = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_policy(
    folder: Path,
    *,
    seed: int,
    characters: str,
    hidden_size: int = 128,
    num_layers: int = 3,
    intermediate_size: int = 512,
    head_dim: int = 32,
    max_context: int = 256,
    tied: bool = False,
) -> Path:
    """Writes config, tokeniser and random weights, and returns the folder. Raises ConfigError.

    With the default sizes and an alphabet of 60 characters it has 0.75 million
    parameters, in float32. Equal arguments give equal files.
    """
    if hidden_size % (2 * head_dim):
        raise ConfigError(
            f"hidden_size is {hidden_size} and head_dim {head_dim}; expected a multiple of two heads, "
            f"such as {max(1, hidden_size // (2 * head_dim)) * 2 * head_dim}"
        )
    tokenizer = character_tokenizer(characters, max_context=max_context)
    num_heads = hidden_size // head_dim
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=head_dim,
        max_position_embeddings=max_context,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = Qwen3ForCausalLM(config)
    policy.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def character_tokenizer(characters: str, *, max_context: int = 256) -> PreTrainedTokenizerFast:
    """One token a character, after <pad>, <eos> and <unk>; its chat template joins the messages' contents."""
    if len(set(characters)) != len(characters) or not characters:
        raise ConfigError(f"characters is {characters!r}; expected at least one, and each once")
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, UNKNOWN, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_context,
        chat_template=_CONTENTS_ONLY,
        clean_up_tokenization_spaces=False,
    )
