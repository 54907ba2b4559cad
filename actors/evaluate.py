"""`penstock eval`: measures a policy folder on an environment's tasks.

Plays episodes through the same rollouts that training uses, and reports the mean
reward, the share of episodes with the full reward of 1, and pass@k.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer

from actors.engines.choose import choose_device, choose_engine, make_engine
from actors.engines.names import EngineChoice
from actors.policy_weights import stage_policy
from actors.render import Renderer
from actors.rollout import Player
from actors.rollout import Progress as RolloutProgress
from environments.client import EnvironmentClient
from penstock import config, log
from penstock.errors import ConfigError, EngineFault, EnvironmentFault
from penstock.policy_files import read_policy_folder
from penstock.trajectory import Lease, PolicyVersion, Sampling, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    policy: Path
    """A Hugging Face folder."""
    environment: str = "127.0.0.1:7081"
    """HOST:PORT of an environment server."""
    split: str = "eval"
    num_tasks: int = 256
    """The split's first tasks; fewer if it holds fewer."""
    samples: int = 1
    """Episodes a task; pass@k is reported for k = 1 and k = samples."""
    temperature: float = 1.0
    """0 is greedy."""
    max_tokens: int = 256
    """Sampled tokens that an episode may hold."""
    truncation_reward: float = 0.0
    """Reward of an episode that is cut at `max_tokens` before its environment was done."""
    num_slots: int = 64
    """Sequences decoded at once."""
    engine: EngineChoice = "torch"
    """vllm, torch, or auto: vllm if it is installed and the device is a GPU."""
    device: str = "auto"
    seed: int = 1
    json: Path | None = None
    """Also write the result to this file."""

    def __post_init__(self) -> None:
        for name in ("num_tasks", "samples", "num_slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    environment: str
    split: str
    num_tasks: int
    samples: int
    mean_reward: float
    accuracy: float
    """Share of the scored episodes with a reward of 1: pass@1."""
    pass_at_k: float
    """Mean over tasks of the chance that one of `samples` episodes has a reward of 1."""
    num_scored: int
    faults: dict[str, int]
    """Episodes without a reward, by cause. They count in no mean."""

    def to_dict(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


def main(argv: Sequence[str]) -> int:
    log.configure("WARNING")
    settings = config.load(EvalConfig, argv, prog="penstock eval", description=__doc__ or "")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    result = uvloop.run(evaluate(settings))
    if settings.json is not None:
        settings.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    Console().print(_table(result))
    return 0


async def evaluate(settings: EvalConfig) -> EvalResult:
    """Raises ConfigError, and EnvironmentFault if the environment does not answer at all."""
    read_policy_folder(settings.policy)
    device = choose_device(settings.device)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(EnvironmentClient(settings.environment))
        description = await client.describe()
        if settings.split not in description.splits:
            raise ConfigError(
                f"environment {description.name} has no split {settings.split!r}; it has {sorted(description.splits)}"
            )
        available = description.splits[settings.split] or settings.num_tasks
        num_tasks = min(settings.num_tasks, available)
        engine = make_engine(
            choose_engine(settings.engine, device),
            settings.policy,
            num_slots=settings.num_slots,
            device=device,
        )
        stack.push_async_callback(engine.stop)
        await engine.start()
        await engine.install(stage_policy(settings.policy, PolicyVersion(0, 0)))
        renderer = Renderer(AutoTokenizer.from_pretrained(settings.policy))
        player = Player(engine, renderer, client, truncation_reward=settings.truncation_reward)
        leases = [
            _lease(settings, Task(description.name, settings.split, index, settings.seed), sample)
            for index in range(num_tasks)
            for sample in range(settings.samples)
        ]
        rewards, faults = await _play_all(player, leases, settings.num_slots)
    return _result(description.name, settings, num_tasks, rewards, faults)


def _lease(settings: EvalConfig, task: Task, sample: int) -> Lease:
    return Lease(
        lease_id=f"eval.{task.index}.{sample}",
        group_id=task.index,
        slot=sample,
        attempt=0,
        task=task,
        sampling=Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens),
        progress_timeout_seconds=60.0,
    )


async def _play_all(
    player: Player, leases: Sequence[Lease], num_slots: int
) -> tuple[dict[int, list[float]], Counter[str]]:
    """Rewards by task, and faults by kind."""
    rewards: defaultdict[int, list[float]] = defaultdict(list)
    faults: Counter[str] = Counter()
    room = asyncio.Semaphore(2 * num_slots)
    run = os.urandom(6).hex()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task("episodes", total=len(leases))

        async def play(lease: Lease) -> None:
            async with room:
                try:
                    trajectory = await player.play(lease, f"{run}.{lease.lease_id}", RolloutProgress())
                    assert trajectory.reward.value is not None
                    rewards[lease.group_id].append(trajectory.reward.value)
                except EnvironmentFault as fault:
                    faults[f"{fault.kind}: {fault}"[:200]] += 1
                except EngineFault as fault:
                    faults[f"engine: {fault}"[:200]] += 1
                bar.advance(shown)

        async with asyncio.TaskGroup() as tasks:
            for lease in leases:
                tasks.create_task(play(lease), name=lease.lease_id)
    return dict(rewards), faults


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that one of k samples drawn from n is right (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def _result(
    name: str, settings: EvalConfig, num_tasks: int, rewards: dict[int, list[float]], faults: Counter[str]
) -> EvalResult:
    every = [reward for of_task in rewards.values() for reward in of_task]
    if not every:
        cause = next(iter(faults), "no episode was played")
        raise EnvironmentFault(f"no episode of {name} came to a reward; the first fault: {cause}")
    chances = [
        pass_at_k(len(of_task), sum(reward >= 1.0 for reward in of_task), min(settings.samples, len(of_task)))
        for of_task in rewards.values()
    ]
    return EvalResult(
        environment=name,
        split=settings.split,
        num_tasks=num_tasks,
        samples=settings.samples,
        mean_reward=sum(every) / len(every),
        accuracy=sum(reward >= 1.0 for reward in every) / len(every),
        pass_at_k=sum(chances) / len(chances),
        num_scored=len(every),
        faults=dict(faults),
    )


def _table(result: EvalResult) -> Table:
    table = Table(title=f"{result.environment}, split {result.split}")
    for column in ("tasks", "episodes scored", "mean reward", "accuracy", f"pass@{result.samples}", "faults"):
        table.add_column(column, justify="right")
    table.add_row(
        str(result.num_tasks),
        str(result.num_scored),
        f"{result.mean_reward:.3f}",
        f"{result.accuracy:.3f}",
        f"{result.pass_at_k:.3f}",
        str(sum(result.faults.values())),
    )
    return table
