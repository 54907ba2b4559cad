from __future__ import annotations

import hashlib

from environments.base import Message
from environments.digest import observation_digest, settings_digest


def test_an_observation_digest_is_what_its_description_says() -> None:
    fields = [b"penstock.observation.v1", b"user", "2 + 2 = é".encode()]
    expected = hashlib.sha256(b"".join(len(field).to_bytes(8, "little") + field for field in fields))
    assert observation_digest([Message(role="user", content="2 + 2 = é")]) == expected.hexdigest()


def test_moving_text_between_messages_changes_the_digest() -> None:
    def digest(*contents: str) -> str:
        return observation_digest(Message(role="user", content=content) for content in contents)

    assert len({digest("ab"), digest("a", "b"), digest("ab", ""), digest("", "ab")}) == 4


def test_settings_have_one_digest_in_any_order() -> None:
    assert settings_digest({"a": 1, "b": [2]}) == settings_digest({"b": [2], "a": 1})
    assert settings_digest({"a": 1}) != settings_digest({"a": 2})
