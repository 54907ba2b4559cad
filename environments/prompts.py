"""Prompt templates: text with {key} in it, over keys that every task has."""

from __future__ import annotations

import string
from collections.abc import Mapping

from penstock.errors import ConfigError


class PromptTemplate:
    """Fills plain keys: no attributes, indices, conversions or formats. {{ and }} are braces."""

    def __init__(self, text: str, example: Mapping[str, object]) -> None:
        """`example` is a task's values. Raises ConfigError if the text asks for others."""
        self._text = text
        try:
            self._pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"the prompt {text!r} is not a template: {error}; write {{{{ for a brace"
            ) from None
        keys = [key for _, key, _, _ in self._pieces if key is not None]
        if not keys:
            raise ConfigError(
                f"the prompt {text!r} has no key, so that all tasks would look alike; {_known(example)}"
            )
        for _, key, form, conversion in self._pieces:
            if key is not None and (key not in example or form or conversion):
                raise ConfigError(
                    f"the prompt {text!r} asks for {{{key}}}; {_known(example)}, each as a plain {{key}}"
                )

    def render(self, values: Mapping[str, object]) -> str:
        return "".join(
            literal + ("" if key is None else str(self._value(key, values)))
            for literal, key, _, _ in self._pieces
        )

    def _value(self, key: str, values: Mapping[str, object]) -> object:
        if key not in values:
            raise ConfigError(
                f"the prompt {self._text!r} asks for {{{key}}}, which some tasks lack; {_known(values)}"
            )
        return values[key]


def _known(values: Mapping[str, object]) -> str:
    return f"the keys are {', '.join(sorted(values))}"
