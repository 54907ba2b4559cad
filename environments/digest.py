"""Digests that server and driver compute alike, in any language.

A field is its length in bytes as an unsigned 64-bit little-endian integer, then the
bytes. A digest is the SHA-256 of a sequence of fields, in lower-case hexadecimal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from environments.base import Message


def observation_digest(messages: Iterable[Message]) -> str:
    """Over the field "penstock.observation.v1", then role and content of each message in UTF-8."""
    texts = ["penstock.observation.v1"]
    for message in messages:
        texts += [message.role, message.content]
    return _digest(texts)


def settings_digest(settings: Mapping[str, object]) -> str:
    """Over the settings that decide an environment's episodes, as JSON with sorted keys."""
    return _digest(["penstock.settings.v1", json.dumps(settings, sort_keys=True, default=str)])


def _digest(texts: Iterable[str]) -> str:
    state = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return state.hexdigest()
