"""`penstock eval`: measures policies on environments' tasks.

Plays episodes through the same rollouts that training uses. Reports the mean reward with its
standard error, pass@k, how many answers were cut at the token limit, and their lengths.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from actors.engines.base import Engine
from actors.evaluation import report
from actors.evaluation.config import EvalConfig
from actors.evaluation.play import Played, play_all
from actors.evaluation.policies import Engines, named_policies
from actors.evaluation.report import Answers, PolicyResult
from actors.render import Renderer
from actors.rollout import Player
from environments.base import Description
from environments.client import EnvironmentClient
from penstock import config, log
from penstock.errors import ConfigError, EnvironmentFault
from penstock.questions import Question, ask

FILE_WIDTH = 140
"""Of the table where it is not printed to a terminal."""


def main(argv: Sequence[str]) -> int:
    log.configure("WARNING")
    given = config.load(EvalConfig, argv, prog="penstock eval", description=__doc__ or "")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    settings = given.resolved()
    results = uvloop.run(evaluate(settings))
    title = f"split {settings.split}, {settings.samples} a prompt, temperature {settings.temperature:g}"
    if len(results) == 1:
        title = f"{results[0].policy}: {title}"
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    console.print(report.table(results, settings.passes, title))
    if settings.json is not None:
        _write(settings.json, report.to_json(results, _told(settings)))
    unanswered = [each for result in results for each in result.unanswered]
    if unanswered:
        environment, fault = unanswered[0]
        raise EnvironmentFault(f"no episode of {environment} came to a reward; the first fault: {fault}")
    return 0


async def evaluate(settings: EvalConfig) -> list[PolicyResult]:
    """Of every policy in every environment. Raises ConfigError, EngineFault, EnvironmentFault.

    settings: resolved.
    """
    results = []
    async with contextlib.AsyncExitStack() as stack:
        clients = await _connect(settings, stack)
        questions = _questions(settings, {name: found for name, (_, found) in clients.items()})
        engines = await stack.enter_async_context(Engines(settings).opened())
        answers = stack.enter_context(Answers(settings.out))
        for name, folder in stack.enter_context(contextlib.closing(named_policies(settings))):
            engine = await engines.with_policy(folder)
            renderer = Renderer(AutoTokenizer.from_pretrained(folder))
            players = {
                environment: Player(engine, renderer, client, truncation_reward=settings.truncation_reward)
                for environment, (client, _) in clients.items()
            }
            played = await _play(settings, name, engine, renderer, players, questions, answers)
            results.append(
                PolicyResult.of(
                    name, list(clients), played, pass_at=settings.passes, threshold=settings.pass_threshold
                )
            )
    return results


async def _connect(
    settings: EvalConfig, stack: contextlib.AsyncExitStack
) -> dict[str, tuple[EnvironmentClient, Description]]:
    """Environments by name. Raises ConfigError: one does not answer, or has no such split."""
    found: dict[str, tuple[EnvironmentClient, Description]] = {}
    for address in settings.environment:
        client = await stack.enter_async_context(EnvironmentClient(address))
        try:
            description = await client.describe()
        except EnvironmentFault as fault:
            raise ConfigError(
                f"environment {address}: {fault}; start it with `penstock env serve`, or correct --environment"
            ) from fault
        if settings.split not in description.splits:
            raise ConfigError(
                f"environment {description.name} at {address} has no split {settings.split!r}; it has "
                f"{', '.join(sorted(description.splits))}"
            )
        if description.name in found:
            raise ConfigError(
                f"environment {description.name} is given twice, the second time as {address}; expected "
                "distinct names"
            )
        found[description.name] = client, description
    return found


def _questions(settings: EvalConfig, descriptions: Mapping[str, Description]) -> tuple[Question, ...]:
    sizes = {
        name: min(settings.num_tasks, description.splits[settings.split] or settings.num_tasks)
        for name, description in descriptions.items()
    }
    return ask(sizes, split=settings.split, samples=settings.samples, seed=settings.seed)


async def _play(
    settings: EvalConfig,
    name: str,
    engine: Engine,
    renderer: Renderer,
    players: Mapping[str, Player],
    questions: Sequence[Question],
    answers: Answers,
) -> list[Played]:
    played: list[Played] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task(name, total=len(questions))

        def done(one: Played) -> None:
            played.append(one)
            answers.write(name, one)
            bar.advance(shown)

        await play_all(
            players, renderer, questions, settings.sampling, num_at_once=2 * engine.num_slots, done=done
        )
    return played


def _told(settings: EvalConfig) -> dict[str, object]:
    names = (
        "split", "num_tasks", "samples", "pass_threshold", "temperature", "top_p", "top_k", "max_tokens",
        "truncation_reward", "seed",
    )  # fmt: skip
    return {name: getattr(settings, name) for name in names}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"json {path} cannot be written: {error}") from error
