from __future__ import annotations

import pytest

from environments.prompts import PromptTemplate
from environments.splits import is_held_out
from penstock.errors import ConfigError


def test_a_template_is_filled_with_plain_keys() -> None:
    template = PromptTemplate("{a}+{b}={{?}}", {"a": 1, "b": 2})
    assert template.render({"a": 3, "b": "x", "c": None}) == "3+x={?}"


@pytest.mark.parametrize(
    "text", ["{c}", "{a.real}", "{a[0]}", "{a!r}", "{a:>4}", "{}", "{0}", "{a", "no key"]
)
def test_anything_but_plain_keys_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        PromptTemplate(text, {"a": 1, "b": 2})


def test_the_refusal_lists_the_keys() -> None:
    with pytest.raises(ConfigError, match="the keys are a, b"):
        PromptTemplate("{c}", {"a": 1, "b": 2})


def test_a_larger_share_holds_out_the_same_questions_and_more() -> None:
    questions = [f"{a} + {b} = ?" for a in range(50) for b in range(50)]
    small = {question for question in questions if is_held_out(question, fraction=0.1)}
    large = {question for question in questions if is_held_out(question, fraction=0.3)}
    assert small < large
    assert len(small) == pytest.approx(250, abs=60)
    assert not any(is_held_out(question, fraction=0.0) for question in questions)
    assert all(is_held_out(question, fraction=1.0) for question in questions)
