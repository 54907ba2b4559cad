"""Every problem of GSM8K, where its files lie beside the checkout: right answers score, wrong ones don't."""

from __future__ import annotations

from pathlib import Path

import pytest

from environments.question_answer import Question, is_correct, read_questions

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = sorted(DATA.glob("gsm8k_*.jsonl"))
FORMS = ("The answer is {}.", "#### {}", "\\boxed{{{}}}")


def read(path: Path) -> list[Question]:
    return list(read_questions(path, "question", "answer"))


@pytest.mark.skipif(not FILES, reason=f"no gsm8k_*.jsonl in {DATA}")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_gold_answer_scores_in_every_form_and_its_neighbour_in_none(path: Path) -> None:
    questions = read(path)
    assert len(questions) > 1000
    for place, question in enumerate(questions):
        for form in FORMS:
            assert is_correct(question.gold, form.format(question.gold)), (question, form)
        number = float(question.gold.replace(",", ""))
        wrong = FORMS[place % len(FORMS)].format(f"{number + 1:.10g}")
        assert not is_correct(question.gold, wrong), (question, wrong)
