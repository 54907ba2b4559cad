"""Bad input: a clear message, exit status 2, and no traceback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from .cluster import Cluster, Program, cluster, wait_until


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with cluster(tmp_path_factory.mktemp("bad-input")) as made:
        made.environment("toy_environments:Letters")
        yield made


def refused(program: Program) -> str:
    """The message of a program that refuses its input."""
    status = program.wait()
    output = program.output()
    assert "Traceback" not in output
    assert status == 2, output
    return " ".join(output.replace("│", " ").split())


def nobodys_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def learner(run: Cluster, name: str, *options: str) -> Program:
    run.write_config(num_steps=1)
    return run.start(name, "learner", "run.toml", *options)


def test_an_unknown_key_names_the_nearest_one(run: Cluster):
    run.write_config(num_steps=1)
    path = run.folder / "typo.toml"
    path.write_text((run.folder / "run.toml").read_text().replace("max_lag", "max_lagg"))
    message = refused(run.start("typo", "learner", "typo.toml"))
    assert "schedule.max-lagg" in message.replace("_", "-")
    assert "--schedule.max-lag" in message
    assert "typo.toml" in message


def test_a_wrong_type_names_the_key(run: Cluster):
    message = refused(learner(run, "type", "--schedule.max_lag", "soon"))
    assert "max-lag" in message.replace("_", "-")
    assert "soon" in message


def test_a_value_out_of_range_says_what_was_expected(run: Cluster):
    message = refused(learner(run, "range", "--schedule.group_size", "1"))
    assert "schedule.group_size is 1" in message
    assert "at least 2" in message


def test_a_missing_configuration_file_is_named(run: Cluster):
    assert "absent.toml: no such file" in refused(run.start("absent", "learner", "absent.toml"))


def test_a_file_that_is_not_toml_is_named(run: Cluster):
    (run.folder / "broken.toml").write_text("policy = [")
    assert "broken.toml: is not TOML" in refused(run.start("broken", "learner", "broken.toml"))


def test_a_missing_policy_is_named(run: Cluster):
    assert "nowhere: no such folder" in refused(learner(run, "nowhere", "--policy", "nowhere"))


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "*.safetensors"),
        ("tokenizer.json", "tokenizer.json"),
    ],
)
def test_a_policy_folder_without_a_file_names_it(run: Cluster, missing: str, named: str):
    folder = run.folder / f"without-{missing}"
    folder.mkdir()
    for file in run.policy.iterdir():
        if file.name != missing:
            (folder / file.name).write_bytes(file.read_bytes())
    assert named in refused(learner(run, f"without-{missing}", "--policy", folder.name))


def test_weights_that_are_no_weights_are_refused(run: Cluster):
    folder = run.folder / "garbage-weights"
    folder.mkdir()
    for file in run.policy.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    message = refused(learner(run, "garbage", "--policy", folder.name, "--run_dir", "garbage-run"))
    assert "garbage-weights" in message


def test_a_port_in_use_is_named(run: Cluster):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        assert address in refused(learner(run, "port", "--bind", address, "--run_dir", "port-run"))
        server = run.start("env-port", "env", "serve", "toy_environments:Letters", "--bind", address)
        assert address in refused(server)


def test_another_address_than_loopback_needs_a_word(run: Cluster):
    message = refused(learner(run, "wide", "--bind", "0.0.0.0:0", "--run_dir", "wide-run"))
    assert "loopback" in message
    assert "--insecure" in message


def test_a_learner_that_nobody_started_is_looked_for_then_named(run: Cluster):
    address = nobodys_address()
    actor = run.start("lonely", "actor", "--learner", address, "--connect_seconds", "2")
    message = refused(actor)
    assert "waiting for the learner" in message
    assert f"no learner answers at {address}" in message


def test_an_actor_that_still_waits_for_its_learner_stops_in_order(run: Cluster):
    address = nobodys_address()
    actor = run.start("early", "actor", "--learner", address)
    wait_until(lambda: "waiting for the learner" in actor.output(), "the actor to wait")

    assert actor.interrupt() == 0
    assert f"stopped while waiting for the learner at {address}" in actor.output()


def test_an_address_that_is_none_is_named(run: Cluster):
    assert "'learner' is not an address" in refused(run.start("no-port", "actor", "--learner", "learner"))


def test_an_unknown_command_names_the_nearest_one(run: Cluster):
    assert "did you mean `penstock learner`" in refused(run.start("command", "lerner"))


def test_a_broken_line_of_a_question_file_is_named(run: Cluster):
    path = run.folder / "questions.jsonl"
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+2?"\n')
    message = refused(run.start("questions", "env", "serve", "question_answer:questions.jsonl"))
    assert "questions.jsonl" in message
    assert "line 2" in message or ":2" in message


def test_a_broken_line_of_a_demonstration_file_is_named(run: Cluster):
    path = run.folder / "demonstrations.jsonl"
    path.write_text('{"prompt": "a=", "completion": "a"}\n{"prompt": "b="}\n')
    options = ("--policy", "policy", "--data", path.name, "--out", "sft-out")
    message = refused(run.start("sft", "train", "sft", *options))
    assert "demonstrations.jsonl" in message
    assert "line 2" in message or ":2" in message


@pytest.mark.parametrize("target", ["no_such_module:Thing", "toy_environments:Absent", "nonsense"])
def test_an_environment_that_does_not_exist_is_named(run: Cluster, target: str):
    name = f"target-{target.replace(':', '-')}"
    message = refused(run.start(name, "env", "serve", target, "--bind", "127.0.0.1:0"))
    assert target.split(":")[-1] in message or target.split(":")[0] in message


def test_a_second_learner_in_the_same_folder_is_refused(tmp_path: Path):
    with cluster(tmp_path) as made:
        made.environment("toy_environments:Letters")
        made.learner(num_steps=10)
        resolved = (made.run_dir / "config.toml").read_text()
        message = refused(made.start("second", "learner", "run.toml", "--seed", "7"))
        assert "another learner is running in this folder" in message
        assert (made.run_dir / "config.toml").read_text() == resolved, (
            "what the first one's programs start with"
        )


def test_an_actor_listens_beyond_loopback_for_broadcasts_only_if_it_is_told_to(run: Cluster):
    options = ("--learner", "192.0.2.1:7070", "--weights-medium", "collective")
    message = refused(run.start("beyond", "actor", *options))
    assert "weights_medium is collective" in message
    assert "--insecure" in message
