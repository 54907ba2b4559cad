"""The library's tasks: which are served, how they are divided, how strictly they are scored."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from environments.reasoning_gym import REFUSED, Item, ReasoningGym, is_correct
from penstock.errors import ConfigError, EnvironmentFault, FaultKind
from penstock.trajectory import Task

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def environment(name: str = "spell_backward", **options: Any) -> ReasoningGym:
    defaults = {"config": {}, "num_train": 40, "num_eval": 10, "seed": 0, "prompt": "", "answer": "whole"}
    return ReasoningGym(name=name, **{**defaults, **options})


def task(split: str = "train", index: int = 0) -> Task:
    return Task("", split, index, 0)


def prompts(played: ReasoningGym, split: str) -> list[str]:
    return [played.prompt(task(split, index))[0].content for index in range(played.describe().splits[split])]


def value(played: ReasoningGym, action: str) -> float | None:
    return played.score(task(), action).reward.value


def test_a_task_gives_prompts_and_strict_rewards() -> None:
    played = environment(prompt="{word}=")
    word = prompts(played, "train")[0].rstrip("=")
    assert value(played, word[::-1]) == 1.0
    assert value(played, f"  {word[::-1]}\n") == 1.0
    assert value(played, word) == 0.0
    assert played.describe().splits == {"train": 40, "eval": 10}


def test_an_answer_that_only_contains_the_right_one_earns_nothing() -> None:
    """The library gives partial credit for it."""
    played = environment(prompt="{word}=")
    word = prompts(played, "train")[0].rstrip("=")
    assert value(played, f"{word[::-1]} {word}") == 0.0


def test_with_tags_only_what_stands_in_the_last_pair_counts() -> None:
    played = environment(prompt="{word}=", answer="tags")
    right = prompts(played, "train")[0].rstrip("=")[::-1]
    assert value(played, f"hm <answer> {right} </answer> there") == 1.0
    assert value(played, f"<answer>no</answer><answer>{right}</answer>") == 1.0
    assert value(played, f"<answer>{right}</answer><answer>no</answer>") == 0.0
    assert value(played, right) == 0.0
    assert played.score(task(), right).metrics == {"answered": 0.0}


def test_no_question_is_held_out_and_trained_on() -> None:
    played = environment("chain_sum", config=SUMS, num_train=150, num_eval=30)
    train, held_out = prompts(played, "train"), prompts(played, "eval")
    assert len(set(train)) == 150
    assert len(set(held_out)) == 30
    assert not set(train) & set(held_out)


def test_no_seed_or_size_moves_a_question_across() -> None:
    trained = set[str]()
    held_out = set[str]()
    for seed in range(3):
        played = environment("chain_sum", config=SUMS, num_train=100 + 20 * seed, num_eval=20, seed=seed)
        trained |= set(prompts(played, "train"))
        held_out |= set(prompts(played, "eval"))
    assert not trained & held_out


def test_equal_settings_give_equal_tasks_and_digests() -> None:
    first, second = environment(seed=3), environment(seed=3)
    assert prompts(first, "train") == prompts(second, "train")
    assert first.describe() == second.describe()


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"prompt": "{word}:"},
        {"answer": "tags"},
        {"num_train": 41},
        {"config": {"min_word_len": 4}},
    ],
)
def test_whatever_changes_a_task_or_reward_changes_the_digest(changed: dict[str, Any]) -> None:
    assert environment(**changed).describe().digest != environment().describe().digest


def test_nearby_seeds_share_no_run_of_items() -> None:
    """The library's own seeds 0 and 1 share all items but one."""
    first, second = prompts(environment(seed=0), "train"), prompts(environment(seed=1), "train")
    assert len(set(first) & set(second)) < len(first) / 2


def test_a_task_with_too_few_questions_says_how_many_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"too few distinct questions: found \d+ of 500 for train and \d+ of 50"
    ):
        environment("chain_sum", config=SUMS, num_train=500, num_eval=50)


def test_a_prompt_that_makes_questions_look_alike_leaves_one_of_each() -> None:
    with pytest.raises(ConfigError, match="too few distinct questions"):
        environment(prompt="What is {source_dataset}?")


def test_a_split_of_no_tasks_is_not_described_as_unbounded() -> None:
    assert environment(num_eval=0).describe().splits == {"train": 40}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "spell_backwards"}, "did you mean 'spell_backward'"),
        ({"config": {"min_word_length": 4}}, "did you mean 'min_word_len'"),
        ({"config": {"min_word_len": "four"}}, "expected int, such as 3"),
        ({"config": {"min_word_len": True}}, "expected int, such as 3"),
        ({"config": {"min_word_len": -1}}, "refuses the config"),
        ({"config": {"seed": 1}}, "use --seed"),
        ({"config": {"size": 1}}, "--num-train"),
        ({"prompt": "{words}"}, "the keys are .*question.*word"),
        ({"prompt": "{word.upper}"}, "plain"),
        ({"name": "game_of_life_halting"}, "takes any text for a right answer"),
        ({"name": "countdown"}, "runs the answer as Python"),
        ({"name": "composite"}, "mixture"),
    ],
)
def test_what_cannot_be_served_is_a_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        environment(**options)


def test_lists_become_what_the_library_wants() -> None:
    assert environment("basic_arithmetic", config={"operators": ["+"]}, num_train=5, num_eval=1)


def test_nan_equals_no_complex_number() -> None:
    """The library gives it the full score."""
    played = environment("complex_arithmetic", num_train=1, num_eval=0)
    assert [value(played, text) for text in ("nan", "NaN + nani", "n a n", "nanj")] == [0.0] * 4


def test_an_answer_that_the_scorer_cannot_read_is_wrong_and_no_fault() -> None:
    """The library's scorer raises ValueError."""
    assert value(environment("prime_factorization", num_train=1, num_eval=0), "two times three") == 0.0


class BrokenDataset:
    """Stands in for a dataset of the library."""

    def __init__(self, score: Any) -> None:
        self._score = score

    def score_answer(self, answer: str, entry: dict[str, Any]) -> Any:
        if isinstance(self._score, Exception):
            raise self._score
        return self._score


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "1", ValueError("always")])
def test_a_scorer_that_gives_no_number_or_fails_on_its_own_answer_is_at_fault(score: Any) -> None:
    item = Item({"question": "?", "answer": "a", "metadata": {}}, BrokenDataset(score))
    with pytest.raises(EnvironmentFault) as fault:
        is_correct(item, "b")
    assert fault.value.kind is FaultKind.DATA


@pytest.mark.parametrize("score", [0.999, 0, -1.0, 1.01])
def test_only_a_score_of_one_is_correct(score: float) -> None:
    assert not is_correct(Item({"question": "?", "answer": "a", "metadata": {}}, BrokenDataset(score)), "a")


EXECUTES = {"eval", "exec", "compile", "sympify", "parse_expr", "parse_latex", "S"}
REVIEWED = {("bitwise_arithmetic", "eval(problem)"), ("number_sorting", "eval(entry['answer'])")}
"""These run the library's own text, and never the policy's."""


def test_every_task_whose_scorer_executes_the_answer_is_refused() -> None:
    """Derived from the library's source, so that an upgrade that adds one fails here."""
    executing = {
        name
        for name, (dataset, _) in DATASETS.items()
        for call in _executing_calls(dataset.score_answer, dataset, set())
        if (name, call) not in REVIEWED
    }
    assert executing == set(REFUSED) - {"composite"}
    assert len(executing) == 9


def _executing_calls(function: FunctionType, owner: type, seen: set[str]) -> Iterator[str]:
    """Calls that run text as code, in a function and in those of the library that it calls."""
    seen.add(function.__qualname__)
    module = sys.modules[function.__module__]
    for call in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        called = _of_the_library(name, owner, module)
        if called is None and name in EXECUTES:
            yield ast.unparse(call)
        elif called is not None and called.__qualname__ not in seen:
            yield from _executing_calls(called, owner, seen)


def _of_the_library(name: str, owner: type, module: ModuleType) -> FunctionType | None:
    found = inspect.unwrap(getattr(owner, name, None) or getattr(module, name, None) or object)
    is_ours = isinstance(found, FunctionType) and found.__module__.startswith("reasoning_gym")
    return found if is_ours else None
