from __future__ import annotations

from environments.base import Message
from environments.hosts import PromptCache
from penstock.trajectory import Task


def prompt(length: int) -> tuple[Message, ...]:
    return (Message(role="user", content="x" * length),)


def test_a_prompt_is_remembered_for_its_task_and_seed() -> None:
    cache = PromptCache(max_characters=10_000)
    cache.put(Task("e", "train", 0, 1), prompt(3))
    assert cache.get(Task("e", "train", 0, 1)) == prompt(3)
    assert cache.get(Task("e", "train", 0, 2)) is None


def test_the_prompt_unused_for_longest_is_forgotten_first() -> None:
    cache = PromptCache(max_characters=3_000)
    tasks = [Task("e", "train", index, 0) for index in range(3)]
    cache.put(tasks[0], prompt(1_000))
    cache.put(tasks[1], prompt(1_000))
    assert cache.get(tasks[0]) is not None
    cache.put(tasks[2], prompt(1_000))
    assert [cache.get(task) is not None for task in tasks] == [True, False, True]


def test_empty_prompts_are_bounded_too() -> None:
    cache = PromptCache(max_characters=1_000)
    tasks = [Task("e", "train", index, 0) for index in range(100)]
    for task in tasks:
        cache.put(task, prompt(0))
    assert sum(cache.get(task) is not None for task in tasks) <= 5
