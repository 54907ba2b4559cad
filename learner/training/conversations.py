"""Text and conversations to tokens, with a mask of what is learned from.

A conversation is rendered by the policy's chat template, piece by piece: what leads up to
an assistant's turn, and the turn itself up to its end token. Pieces are tokenised apart,
as actors do, so that a mask never cuts a token. Without a template a piece is the
concatenation of its messages' contents. Plain text is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from learner.training.packing import TokenSequence
from penstock.errors import ConfigError

Messages = list[dict[str, str]]
_ASSISTANT = "assistant"


class Encoder:
    """Encodes for one policy. Every method raises ConfigError that names `where`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> None:
        """max_tokens: what the policy's context has room for."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._end: str = tokenizer.eos_token
        self._has_template = bool(tokenizer.chat_template)

    def completion(self, where: str, prompt: object, completion: object) -> TokenSequence:
        """A prompt and its answer, both text or both messages. Only the answer and its end are learned from."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._join(where, [(prompt, False), (completion, True)], special=True)
        turns = messages(where, "prompt", prompt)
        conversation = turns + messages(where, "completion", completion)
        role = conversation[-1]["role"]
        if role != _ASSISTANT:
            raise ConfigError(f'{where}: the completion ends with role {role!r}; expected "assistant"')
        pieces = self._pieces(where, conversation, first=len(turns))
        return self._join(where, pieces, special=not self._has_template)

    def conversation(self, where: str, conversation: object) -> TokenSequence:
        """Several turns: every turn of the assistant is learned from, each with its end token."""
        found = messages(where, "messages", conversation)
        if all(message["role"] != _ASSISTANT for message in found):
            raise ConfigError(f"{where}: has no turn of the assistant to learn from")
        return self._join(where, self._pieces(where, found, first=0), special=not self._has_template)

    def _pieces(self, where: str, conversation: Messages, *, first: int) -> list[tuple[str, bool]]:
        """(text, whether it is learned from); turns before message `first` are not. End tokens are left out."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        for number, message in enumerate(conversation):
            if message["role"] != _ASSISTANT or number < first:
                continue
            before = self._render(conversation[:number], answer_follows=True)
            after = self._render(conversation[: number + 1], answer_follows=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise ConfigError(
                    f"{where}: the policy's chat template renders earlier turns otherwise once later ones follow, so "
                    "that no mask over them exists; give each turn as an example of its own"
                )
            turn, ended, _ = after[len(before) :].partition(self._end)
            pieces += [(before[len(done) :], False), (turn, True)]
            done = before + turn + (self._end if ended else "")
        return pieces

    def _render(self, conversation: Messages, *, answer_follows: bool) -> str:
        if not self._has_template:
            return "".join(message["content"] for message in conversation)
        return str(
            self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=answer_follows
            )
        )

    def _join(self, where: str, pieces: Sequence[tuple[str, bool]], *, special: bool) -> TokenSequence:
        """special: whether the tokeniser adds its own first tokens, which a template writes itself."""
        token_ids: list[int] = []
        mask: list[int] = []
        for number, (text, learned) in enumerate(pieces):
            ids = list(self._tokenizer(text, add_special_tokens=special and number == 0)["input_ids"])
            ids += [self._tokenizer.eos_token_id] if learned else []
            token_ids += ids
            mask += [int(learned)] * len(ids)
        if len(token_ids) > self._max_tokens:
            raise ConfigError(
                f"{where}: has {len(token_ids)} tokens; the policy's context has room for {self._max_tokens}"
            )
        return TokenSequence(
            token_ids=np.asarray(token_ids, dtype=np.int32), loss_mask=np.asarray(mask, dtype=np.uint8)
        )


def messages(where: str, name: str, value: Any) -> Messages:
    """A list of {"role": text, "content": text}. Raises ConfigError."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f'{where}: "{name}" is {value!r}; expected text or a list of messages')
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ConfigError(
                f'{where}: "{name}" holds {message!r}; expected a role and a content, both text'
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]
