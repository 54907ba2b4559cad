"""Evaluations during a run: one version each, while training goes on, whoever dies."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from learner.coordinator.evaluation.config import EvaluationConfig
from penstock.errors import EnvironmentFault, FaultKind
from penstock.trajectory import Lease
from penstock.v1 import operator_pb2

from .bench import ENVIRONMENT, RESTART_FLEET, Bench, until
from .scripted_actor import Script, fixed

EVALUATION = EvaluationConfig(every_steps=4, num_prompts=20, samples_per_prompt=2, pass_at=(1, 2))
STEADY = Script(num_tokens=fixed(5), token_seconds=0.05)
SLOW = Script(num_tokens=fixed(5), token_seconds=0.2)
SLOW_OPTIONS = ("--num-tokens", "5", "--token-seconds", "0.2")
"""Some seconds for an evaluation, so that there is time to die in the midst of it."""
NUM_SLOTS = 40


def results(bench: Bench) -> list[dict[str, Any]]:
    """Lines of evaluations.jsonl."""
    path = bench.run_dir / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def holders(bench: Bench) -> list[str]:
    """Who was said to hold a version, in order."""
    told = [message for message in bench.events("evaluation") if message.endswith(" holds it")]
    return [
        name for message in told for name in message.split(" version ")[1].split(" ", 1)[1][:-9].split(", ")
    ]


def is_ahead(status: operator_pb2.GetStatusResponse) -> bool:
    """A step was published while an evaluation is open."""
    evaluation = status.evaluation
    return evaluation.HasField("open") and status.version.step > evaluation.open.step


async def under_way(bench: Bench) -> None:
    await bench.when(
        lambda status: status.evaluation.HasField("open") and status.evaluation.num_answers > 0, "answers"
    )


def check_complete(bench: Bench, steps: list[int]) -> None:
    """Every evaluation has all answers, each token of which is of its version."""
    assert [line["step"] for line in results(bench)] == steps
    for line in results(bench):
        assert (line["state"], line["num_answers"], line["num_missing"]) == ("complete", NUM_SLOTS, 0)
        assert line["scores"][ENVIRONMENT]["num_answers"] == NUM_SLOTS
        assert line["scores"][ENVIRONMENT]["reward_mean"] == line["scores"]["mean"]["reward_mean"]
    rows = bench.rows(
        "SELECT versions, epoch, step, num_sampled FROM evaluation_answers a JOIN evaluations USING (number) "
        "WHERE a.state = 'counted' AND result IS NOT NULL"
    )
    assert len(rows) == NUM_SLOTS * len(steps)
    for versions, epoch, step, num_sampled in rows:
        assert json.loads(versions) == [[epoch, step, num_sampled]]
    assert not bench.rows("SELECT 1 FROM groups WHERE split <> 'train'")


@pytest.mark.parametrize("max_lag", [0, 4])
async def test_an_evaluation_is_of_one_version_while_training_goes_on(tmp_path: Path, max_lag: int):
    async with Bench(tmp_path, num_steps=8, max_lag=max_lag, evaluation=EVALUATION) as bench:
        await bench.start(step_seconds=0.1)
        bench.actor("a1", script=STEADY)
        bench.actor("a2", script=STEADY)
        await bench.when(is_ahead, "a step that is published while an evaluation is open")
        await bench.trained()
        bench.check()
        steps = [line["step"] for line in results(bench)]
        check_complete(bench, steps)
        assert steps[0] == 0
        assert steps[-1] == 8, "the last version is evaluated before the actors go home"


async def test_one_actor_alone_trains_without_lag_and_evaluates(tmp_path: Path):
    async with Bench(tmp_path, num_steps=4, max_lag=0, evaluation=EVALUATION) as bench:
        await bench.start()
        bench.actor("a1", script=STEADY)
        await bench.trained()
        bench.check()
        check_complete(bench, [0, 4])


async def test_the_evaluation_of_a_killed_actor_is_finished_by_another(tmp_path: Path):
    async with Bench(tmp_path, num_steps=6, max_lag=4, evaluation=EVALUATION) as bench:
        await bench.start(step_seconds=0.5)
        actors = {name: bench.actor_process(name, *SLOW_OPTIONS) for name in ("a1", "a2")}
        await under_way(bench)
        (victim,) = await until(lambda: holders(bench)[:1], "an actor to hold the version")
        actors[victim].kill()
        await until(lambda: bench.events("dead"), "the victim to be declared dead")
        heir = {"a1": "a2", "a2": "a1"}[victim]
        await until(lambda: heir in holders(bench), "the other to hold a version")
        await bench.trained()
        bench.check()
        steps = [line["step"] for line in results(bench)]
        check_complete(bench, steps)
        assert steps[-1] == 6


@pytest.mark.slow
async def test_an_actor_turns_back_to_finish_the_evaluation_of_a_killed_one(tmp_path: Path):
    """The other had gone on to newer versions by then."""
    async with Bench(tmp_path, num_steps=5, max_lag=4, evaluation=EVALUATION) as bench:
        await bench.start(step_seconds=2.0)
        actors = {name: bench.actor_process(name, *SLOW_OPTIONS) for name in ("a1", "a2")}
        await under_way(bench)
        (victim,) = await until(lambda: holders(bench)[:1], "an actor to hold the version")
        heir = {"a1": "a2", "a2": "a1"}[victim]
        actors[victim].send(signal.SIGSTOP)
        await bench.when(
            lambda status: any(a.actor_id == heir and a.installed.step > 0 for a in status.actors),
            "the other to go on",
        )
        actors[victim].kill()
        await bench.trained()
        bench.check()
        check_complete(bench, [line["step"] for line in results(bench)])
        assert results(bench)[0]["step"] == 0
        assert f"evaluation 1 of version 1.0 {heir} holds it" in bench.events("evaluation")


@pytest.mark.slow
async def test_an_evaluation_goes_on_when_the_coordinator_is_started_again(tmp_path: Path):
    async with Bench(tmp_path, num_steps=4, max_lag=2, fleet=RESTART_FLEET, evaluation=EVALUATION) as bench:
        await bench.start(step_seconds=0.3)
        bench.actor("a1", script=SLOW)
        bench.actor("a2", script=SLOW)
        await under_way(bench)
        assert bench.coordinator is not None
        bench.coordinator.kill()
        await bench.start_coordinator()
        await bench.trained()
        bench.check()
        steps = [line["step"] for line in results(bench)]
        check_complete(bench, steps)
        assert steps[0] == 0
        assert [message for message in bench.events("evaluation") if " goes on with " in message]


async def test_an_evaluation_begins_again_when_the_trainer_dies(tmp_path: Path):
    async with Bench(tmp_path, num_steps=4, max_lag=2, fleet=RESTART_FLEET, evaluation=EVALUATION) as bench:
        await bench.start(step_seconds=0.3)
        bench.actor("a1", script=SLOW)
        bench.actor("a2", script=SLOW)
        await under_way(bench)
        assert bench.trainer is not None
        bench.trainer.kill()
        bench.start_trainer(step_seconds=0.3)
        await bench.trained()
        bench.check()
        check_complete(bench, [line["step"] for line in results(bench)])
        assert results(bench)[0]["epoch"] == 2
        assert [message for message in bench.events("evaluation") if "begins again" in message]


def endless(lease: Lease) -> int:
    return 10_000 if lease.pin is not None else 5


async def test_a_deadline_ends_an_evaluation_with_what_is_there(tmp_path: Path):
    evaluation = EvaluationConfig(every_steps=4, num_prompts=4, deadline_seconds=2.0)
    async with Bench(tmp_path, num_steps=4, max_lag=0, evaluation=evaluation) as bench:
        await bench.start()
        bench.actor("a1", script=Script(num_tokens=endless, token_seconds=0.02))
        await bench.trained()
        bench.check()
        assert [(line["step"], line["state"], line["num_missing"]) for line in results(bench)] == [
            (0, "deadline", 4),
            (4, "deadline", 4),
        ]
        assert all(line["scores"]["mean"] is None for line in results(bench)), "nothing is not 0"


def broken(lease: Lease) -> EnvironmentFault | None:
    if lease.pin is None or lease.slot != 0:
        return None
    return EnvironmentFault("the task is broken", kind=FaultKind.DATA)


async def test_a_fault_is_counted_apart_and_never_a_reward(tmp_path: Path):
    evaluation = EvaluationConfig(every_steps=4, num_prompts=4, samples_per_prompt=2)
    async with Bench(tmp_path, num_steps=4, evaluation=evaluation) as bench:
        await bench.start()
        bench.actor("a1", script=Script(num_tokens=fixed(5), fault=broken))
        await bench.trained()
        bench.check()
        for line in results(bench):
            assert (line["state"], line["num_answers"], line["num_missing"]) == ("complete", 7, 0)
            assert line["faults"] == {"data: the task is broken": 1}
            # Odd slots have reward 1, even ones 0, and slot 0 none.
            assert line["scores"]["mean"]["reward_mean"] == pytest.approx(4 / 7)


@pytest.mark.slow
async def test_an_actor_that_leaves_gives_its_part_of_an_evaluation_back(tmp_path: Path):
    async with Bench(tmp_path, num_steps=6, max_lag=2, evaluation=EVALUATION) as bench:
        await bench.start(step_seconds=0.3)
        actors = {name: bench.actor_process(name, *SLOW_OPTIONS) for name in ("a1", "a2")}
        await under_way(bench)
        (leaver,) = await until(lambda: holders(bench)[:1], "an actor to hold the version")
        actors[leaver].send(signal.SIGTERM)
        assert await actors[leaver].end() == 0
        await bench.trained()
        bench.check()
        check_complete(bench, [line["step"] for line in results(bench)])
