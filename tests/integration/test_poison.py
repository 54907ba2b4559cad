"""Malformed trajectories against a real coordinator process, over real gRPC."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

from learner.config import RunConfig
from penstock import PROTOCOL, config
from penstock.codec import checksum, lease_from_wire, manifest_to_wire, trajectory_item, version_to_wire
from penstock.trajectory import PolicyVersion, Reward, VersionSpan
from penstock.v1 import (
    coordinator_pb2,
    coordinator_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from penstock.weights.manifest import HostTensor
from penstock.weights.segment import SegmentRing

from ..unit.learner.coordinator.fakes import make_trajectory
from .cluster import cluster

VERSION = PolicyVersion(1, 0)


@pytest.fixture
def address(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A coordinator whose trainer has published one version."""
    with cluster(tmp_path) as made:
        made.environment("toy_environments:Letters")
        made.write_config(num_steps=10)
        settings = config.load(RunConfig, [str(tmp_path / "run.toml")], prog="test", description="")
        made.run_dir.mkdir()
        (made.run_dir / "config.toml").write_text(
            config.to_toml(settings)
            .replace('"policy"', f'"{made.policy}"')
            .replace('"run"', f'"{made.run_dir}"')
        )
        command = [sys.executable, "-m", "learner.coordinator", str(made.run_dir / "config.toml")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("coordinator ready on "), line
            where = line.removeprefix("coordinator ready on ").strip()
            ring = SegmentRing(name_prefix="penstock-test-poison")
            try:
                publish(where, ring)
                yield where
            finally:
                ring.close()
                process.terminate()
                assert process.wait(timeout=60) == 0


def publish(address: str, ring: SegmentRing) -> None:
    tensor = HostTensor(name="w", dtype="F32", shape=(2,), data=np.zeros(8, dtype=np.uint8))
    manifest = ring.write(VERSION, [tensor])
    with grpc.insecure_channel(address) as channel:
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        assert stub.OpenLineage(trainer_pb2.OpenLineageRequest(step=0), timeout=30).epoch == 1
        request = trainer_pb2.PublishVersionRequest(
            version=version_to_wire(VERSION), manifest=manifest_to_wire(manifest)
        )
        stub.PublishVersion(request, timeout=30)


def poison(leases):  # type: ignore[no-untyped-def]
    """(code, trajectory) for everything that must be refused."""
    five = np.array([0, 0, -1, -1, -1], dtype=np.float32)
    changes = [
        ("NON_FINITE_LOGPROB", {"logprobs": np.where(five < 0, np.nan, five).astype(np.float32)}),
        ("NON_FINITE_LOGPROB", {"logprobs": np.where(five < 0, -np.inf, five).astype(np.float32)}),
        ("POSITIVE_LOGPROB", {"logprobs": (-five).astype(np.float32)}),
        ("TOKEN_OUT_OF_RANGE", {"token_ids": np.array([0, 1, 2, 3, 10_000], dtype=np.int32)}),
        ("TOKEN_OUT_OF_RANGE", {"token_ids": np.array([-1, 1, 2, 3, 4], dtype=np.int32)}),
        ("BAD_LENGTHS", {"token_ids": np.array([1, 2, 3], dtype=np.int32)}),
        ("BAD_LENGTHS", {"logprobs": five[:4]}),
        ("BAD_MASK", {"loss_mask": np.zeros(5, dtype=np.uint8)}),
        ("BAD_VERSIONS", {"versions": (VersionSpan(VERSION, 2),)}),
        ("UNKNOWN_VERSION", {"versions": (VersionSpan(PolicyVersion(1, 7), 3),)}),
        ("UNKNOWN_LEASE", {"lease_id": "99.0.0"}),
        ("UNKNOWN_LEASE", {"lease_id": "garbage"}),
        ("BAD_REWARD", {"reward": Reward.valid(float("nan"))}),
        ("BAD_ID", {"trajectory_id": "short"}),
    ]
    for code, change in changes:
        yield code, trajectory_item(make_trajectory(leases[0], VERSION, **change))
    flipped = trajectory_item(make_trajectory(leases[0], VERSION))
    payload = bytearray(flipped.trajectory)
    payload[len(payload) // 2] ^= 1
    flipped.trajectory = bytes(payload)
    yield "CORRUPT", flipped
    yield "CORRUPT", coordinator_pb2.SubmitItem(trajectory=b"\xff", checksum=checksum(b"\xff"))


def test_poison_is_rejected_with_a_code_and_the_good_beside_it_is_kept(address: str):
    with grpc.insecure_channel(address) as channel:
        actor = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        joined = actor.Join(
            coordinator_pb2.JoinRequest(actor_id="a", protocol=PROTOCOL, engine="fake", num_slots=8),
            timeout=30,
        )
        digest = newest_digest(actor, joined.session_id)
        request = coordinator_pb2.AcquireLeasesRequest(
            session_id=joined.session_id,
            max_leases=8,
            installed=version_to_wire(VERSION),
            installed_digest=digest,
        )
        leases = [lease_from_wire(lease) for lease in actor.AcquireLeases(request, timeout=30).leases]
        assert len(leases) == 8
        items, expected = [], []
        for code, bad in poison(leases):
            items.append(bad)
            expected.append((coordinator_pb2.VERDICT_KIND_REJECTED, f"REJECTION_CODE_{code}"))
            if len(items) < 2 * len(leases):
                items.append(trajectory_item(make_trajectory(leases[len(items) // 2], VERSION)))
                expected.append((coordinator_pb2.VERDICT_KIND_ACCEPTED, "REJECTION_CODE_UNSPECIFIED"))
        for number, item in enumerate(items, start=1):
            item.sequence = number
        submit = coordinator_pb2.SubmitRequest(session_id=joined.session_id, items=items)
        (answer,) = list(actor.Submit(iter([submit]), timeout=30))
        assert answer.acknowledged == len(items)
        got = [(v.kind, coordinator_pb2.RejectionCode.Name(v.code)) for v in answer.verdicts]
        assert got == expected
        status = operator_pb2_grpc.OperatorServiceStub(channel).GetStatus(
            operator_pb2.GetStatusRequest(), timeout=30
        )
    accepted = sum(kind == coordinator_pb2.VERDICT_KIND_ACCEPTED for kind, _ in expected)
    assert status.ledger.accepted == status.ledger.pending == accepted
    assert status.ledger.imbalance == 0
    assert sum(status.ledger.rejected.values()) == len(expected) - accepted


def test_an_unknown_session_and_a_wrong_protocol_are_refused(address: str):
    with grpc.insecure_channel(address) as channel:
        actor = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            actor.Heartbeat(coordinator_pb2.HeartbeatRequest(session_id="never"), timeout=30)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.RpcError) as caught:
            actor.Join(coordinator_pb2.JoinRequest(actor_id="a", protocol=999, num_slots=1), timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "protocol 999" in caught.value.details()


def newest_digest(actor: coordinator_pb2_grpc.CoordinatorServiceStub, session_id: str) -> str:
    watch = actor.Watch(coordinator_pb2.WatchRequest(session_id=session_id), timeout=60)
    manifest = next(directive.version for directive in watch if directive.HasField("version"))
    watch.cancel()
    return str(manifest.digest)
