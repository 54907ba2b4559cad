"""Text to token ids, once: nothing that was sampled is ever tokenised again.

With a chat template the first observation is rendered by it, and each later one as
what the template adds to a conversation for it. Without a template an observation is
the concatenation of its messages' contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from environments.base import Message
from penstock.errors import ConfigError
from penstock.trajectory import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_PROMPTS = 64
"""Remembered: about as many groups as an actor plays at once."""
_ASSISTANT = "\u241f"
"""Stands for a turn of the policy when the template is asked what follows one."""


class Renderer:
    """Turns observations into token ids, and sampled token ids into text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self.stop_ids = frozenset(i for i in (tokenizer.eos_token_id,) if i is not None)
        self._first = lru_cache(maxsize=_NUM_PROMPTS)(self._render_first)

    def first(self, messages: Sequence[Message]) -> TokenIds:
        """[P] int32, not to be written to: the prompt of an episode. Siblings, who share it, are rendered once."""
        return self._first(tuple(messages))

    def _render_first(self, messages: tuple[Message, ...]) -> TokenIds:
        if not self._has_template:
            return self._ids(_plain(messages), special=True)
        return self._ids(self._template(_dicts(messages)), special=False)

    def following(self, messages: Sequence[Message], *, stopped: bool) -> TokenIds:
        """[P] int32: what stands between the policy's turn and its next one.

        stopped: the policy ended its turn itself, so that its end token is there already.
        """
        if not self._has_template:
            return self._ids(_plain(messages), special=False)
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ASSISTANT}]
        text = self._template([*turn, *_dicts(messages)])
        _, found, suffix = text.rpartition(_ASSISTANT)
        if not found:
            raise ConfigError(
                "the policy's chat template drops the assistant's words; expected it to keep them"
            )
        end = self._tokenizer.eos_token
        if stopped and end and suffix.startswith(end):
            suffix = suffix[len(end) :]
        return self._ids(suffix, special=False)

    def text(self, token_ids: Sequence[int]) -> str:
        """What the policy said in a turn, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _template(self, conversation: list[dict[str, str]]) -> str:
        return str(
            self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        )

    def _ids(self, text: str, *, special: bool) -> TokenIds:
        ids = np.asarray(self._tokenizer(text, add_special_tokens=special)["input_ids"], dtype=np.int32)
        ids.flags.writeable = False
        return ids


def _plain(messages: Sequence[Message]) -> str:
    return "".join(message.content for message in messages)


def _dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
