"""Actors that are killed in the midst of long rollouts: others go on from the last piece that was told."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from penstock.codec import trajectory_from_wire
from penstock.trajectory import Trajectory
from penstock.v1 import trajectory_pb2

from ..integration.environment_servers import serving
from .bench import QUICK_FLEET, Bench, until
from .scripted_actor import Script, token_of
from .test_environments import HERE

MAX_TOKENS = 600
EVERY = 64
FLEET = dataclasses.replace(QUICK_FLEET, stream_tokens=EVERY, straggler_factor=0.0)
"""No rivals, which would play what is slow anew."""


def sampled_as_told(trajectory: Trajectory) -> bool:
    """Whether each sampled token is what the scripted engine samples under the version that it is told to be of."""
    versions = [span.version for span in trajectory.versions for _ in range(span.num_tokens)]
    sampled = trajectory.token_ids[np.asarray(trajectory.loss_mask, dtype=bool)]
    return sampled.tolist() == [token_of(version) for version in versions]


async def test_a_killed_actors_long_rollouts_are_gone_on_from_their_last_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    async with (
        serving("toy_environments:Letters", workers=1) as letters,
        Bench(
            tmp_path,
            num_steps=6,
            max_lag=4,
            fleet=FLEET,
            environments=(letters,),
            max_tokens=MAX_TOKENS,
            keep_payloads=True,
        ) as bench,
    ):
        await bench.start()
        # It plays some groups while others train on theirs: its rollouts are of several versions.
        victim = bench.actor_process("victim", "--asks", "--token-seconds", "0.02")
        await bench.when(lambda status: any(a.num_leases for a in status.actors), "the victim to hold leases")
        bench.actor("heir", script=Script(token_seconds=0.001), asks=True)
        await bench.reached(1)
        await bench.when(
            lambda status: any(
                a.stats.num_tokens > 2 * 8 * EVERY for a in status.actors if a.actor_id == "victim"
            ),
            "the victim to have told some pieces",
        )
        victim.kill()
        await until(lambda: bench.events("kept"), "what it played to be kept")
        await bench.trained()
        bench.check()
        (told,) = bench.events("kept")
        match = re.fullmatch(
            r"(\d+) rollouts of victim, with (\d+) of the (\d+) tokens that it told of", told
        )
        assert match is not None, told
        num_rollouts, num_kept, num_told = map(int, match.groups())
        assert num_told - num_kept < EVERY * num_rollouts
        assert bench.rows("SELECT value FROM tallies WHERE name = 'handed_over'") == [(num_rollouts,)]
        kept = map(trajectory_pb2.Trajectory.FromString, bench.payloads())
        trajectories = [trajectory_from_wire(message) for message in kept]
        assert all(map(sampled_as_told, trajectories))
        lengths = {sum(span.num_tokens for span in each.versions) for each in trajectories}
        assert lengths == {MAX_TOKENS}, "nothing was sampled twice or left out"
