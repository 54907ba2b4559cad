"""Operators' calls and commands against a live run."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from .cluster import Cluster, Program, cluster, wait_until


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with cluster(tmp_path_factory.mktemp("operators")) as made:
        made.environment("toy_environments:Letters")
        made.learner("--training.checkpoint.every_steps", "100000", num_steps=100_000)
        made.actor("a1")
        made.wait_for_step(1)
        yield made


_calls = iter(range(1000))


def command(run: Cluster, name: str, *options: str) -> Program:
    program = run.start(f"{name}-{next(_calls)}", name, "--learner", run.address, *options)
    assert program.wait() == 0, program.output()
    return program


def test_status_shows_the_run(run: Cluster):
    output = command(run, "status").output()
    assert "a1" in output
    assert "letters" in output
    assert "imbalance" in output


def test_why_says_what_the_learner_does(run: Cluster):
    assert "the learner" in command(run, "why").output()


def test_a_paused_run_trains_no_more_until_it_is_resumed(run: Cluster):
    command(run, "pause")
    wait_until(
        lambda: run.status().num_groups_ready < 2 and not run.status().actors[0].num_leases, "a standstill"
    )
    step = run.status().version.step
    assert "paused" in command(run, "why").output()
    command(run, "resume")
    run.wait_for_step(step + 2)


def test_a_checkpoint_is_written_when_asked_for(run: Cluster):
    command(run, "checkpoint")
    wait_until(lambda: run.rows("SELECT 1 FROM checkpoints"), "a checkpoint")
    assert "checkpoint" in command(run, "events").output()


def test_an_actor_that_is_asked_to_drain_leaves_and_another_takes_over(run: Cluster):
    leaving = run.actor("leaving")
    wait_until(lambda: len(run.status().actors) == 2, "both actors")
    address = next(actor.address for actor in run.status().actors if actor.actor_id == "leaving")
    drain = run.start("drain", "drain", address)
    assert drain.wait() == 0, drain.output()
    assert leaving.wait() == 0
    wait_until(lambda: [actor.actor_id for actor in run.status().actors] == ["a1"], "the actor to be gone")


def test_every_server_has_health_and_reflection(run: Cluster):
    actor = run.status().actors[0].address
    environment = run.status().environments[0].address
    expected = {
        run.address: "penstock.v1.CoordinatorService",
        actor: "penstock.v1.ActorService",
        environment: "penstock.v1.EnvironmentService",
    }
    for address, service in expected.items():
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert service in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_nobody_at_the_address_is_a_clear_message(run: Cluster, tmp_path: Path):
    program = run.start("nobody", "status", "--learner", "127.0.0.1:9")
    assert program.wait() != 0
    assert "127.0.0.1:9" in program.output()
    assert "Traceback" not in program.output()
