"""`penstock eval`, and evaluations during a run, with real processes and the torch engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.coordinator.audit import audit

from .cluster import Cluster, Program, cluster, wait_until

LETTERS = "toy_environments:Letters"


def evaluate(run: Cluster, name: str, *options: str) -> Program:
    return run.start(name, "eval", "--device", "cpu", "--max-tokens", "4", *options)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_eval_measures_policies_on_several_environments(tmp_path: Path):
    with cluster(tmp_path) as run:
        run.environment(LETTERS)
        run.environment(LETTERS, "--option", "name=others")
        options = ("--samples", "4", "--pass-at", "1", "4", "--pass-threshold", "0.25", "--num-tasks", "5")
        files = ("--json", "result.json", "--out", "answers.jsonl")
        where = ("--environment", *run.environments)
        program = evaluate(run, "eval", "--policy", "policy", "policy", *where, *options, *files)
        assert program.wait() == 0, program.output()
        told = json.loads((tmp_path / "result.json").read_text())
        assert [each["policy"] for each in told["policies"]] == ["policy", "policy"]
        for each in told["policies"]:
            letters, others, mean = (each["scores"][name] for name in ("letters", "others", "mean"))
            assert letters["num_prompts"] == 5
            assert letters["num_answers"] == 20
            assert mean["reward_mean"] == (letters["reward_mean"] + others["reward_mean"]) / 2
            assert 0 <= mean["pass_at"]["1"] <= mean["pass_at"]["4"] <= 1
            assert each["faults"] == {"letters": {}, "others": {}}
        first, second = (each["scores"] for each in told["policies"])
        assert first == second, "the same weights, tasks and seeds"
        answers = read_lines(tmp_path / "answers.jsonl")
        assert len(answers) == 2 * 2 * 20
        assert {answer["split"] for answer in answers} == {"eval"}
        assert all(answer["prompt"].endswith("=") for answer in answers)
        assert "pass@4" in program.output()


@pytest.mark.slow
def test_eval_says_what_it_cannot_do(tmp_path: Path):
    with cluster(tmp_path) as run:
        run.environment("toy_environments:TrainOnly")
        where = ("--environment", *run.environments)
        wrong = {
            "--pass-at 4": ("--policy", "policy", "--pass-at", "4", *where),
            "no split": ("--policy", "policy", *where),
            "nobody there": ("--policy", "policy", "--environment", "127.0.0.1:9"),
            "no policy": where,
        }
        programs = [
            evaluate(run, f"eval-{number}", *options) for number, options in enumerate(wrong.values())
        ]
        assert [program.wait() for program in programs] == [2, 2, 2, 2]
        expected = (
            "pass@k needs 1 to as many answers as each prompt has, which are 1",
            "has no split 'eval'; it has train",
            "start it with `penstock env serve`",
            "got neither of --policy FOLDER ... and --run RUN_DIR",
        )
        for program, text in zip(programs, expected, strict=True):
            # Whatever the box that stands around it.
            assert text in " ".join(program.output().replace("│", " ").split())


@pytest.mark.slow
def test_a_run_evaluates_its_versions_while_it_trains_and_an_actor_dies(tmp_path: Path):
    with cluster(tmp_path) as run:
        run.environment(LETTERS)
        serve = (
            "env",
            "serve",
            LETTERS,
            "--bind",
            "127.0.0.1:0",
            "--workers",
            "1",
            "--option",
            "name=others",
        )
        others = run.start("others", *serve).wait_for_line("serving ").rpartition(" on ")[2]
        places = ("--evaluation.environments", *run.environments, others)
        options = (*places, "--evaluation.every-steps", "3", "--evaluation.num-prompts", "8")
        samples = ("--evaluation.samples-per-prompt", "4", "--evaluation.pass-at", "1", "4")
        learner = run.learner(*options, *samples, num_steps=6)
        actors = {name: run.actor(name) for name in ("a1", "a2")}
        wait_until(lambda: run.status().evaluation.num_answers > 0, "answers of an evaluation")
        holds = "SELECT message FROM events WHERE kind = 'evaluation' AND message LIKE '%a1%holds it'"
        actors.pop("a1" if run.rows(holds) else "a2").kill()
        assert learner.wait() == 0, learner.output()
        found = audit(run.run_dir / "ledger.sqlite")
        assert not found.violations, found.violations
        lines = read_lines(run.run_dir / "evaluations.jsonl")
        steps = [line["step"] for line in lines]
        # An evaluation whose version is gone when its actor dies begins again with the newest one.
        assert steps == sorted(set(steps)), steps
        assert steps[-1] == 6
        for line in lines:
            assert (line["state"], line["num_answers"]) == ("complete", 64)
            assert set(line["scores"]) == {"letters", "others", "mean"}
        rows = run.rows(
            "SELECT versions, epoch, step, num_sampled FROM evaluation_answers a JOIN evaluations USING (number) "
            "WHERE a.state = 'counted'"
        )
        assert len(rows) == 64 * len(lines)
        for versions, epoch, step, num_sampled in rows:
            assert json.loads(versions) == [[epoch, step, num_sampled]]
        assert run.rows("SELECT DISTINCT environment FROM trajectories") == [("letters",)]
        # The checkpoints that are left, measured on the same tasks.
        program = evaluate(run, "eval", "--run", "run", "--num-tasks", "8", "--json", "kept.json")
        assert program.wait() == 0, program.output()
        kept = json.loads((tmp_path / "kept.json").read_text())
        assert [each["policy"] for each in kept["policies"]][-1] == "step 6"
