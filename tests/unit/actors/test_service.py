"""What an actor keeps of its rollouts."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from actors.service import Actor
from penstock.signals import Stop
from penstock.trajectory import Lease, Sampling, Task
from penstock.v1 import coordinator_pb2 as pb


def an_actor() -> Actor:
    """One whose peers are never asked for anything."""
    peers: dict[str, Any] = {
        "session": SimpleNamespace(),
        "engine": SimpleNamespace(num_slots=4),
        "installer": SimpleNamespace(look=lambda: None),
        "uplink": SimpleNamespace(held_leases=list),
    }
    return Actor(**peers, players={}, run_id="run", heartbeat_seconds=1.0, stop=Stop())


async def test_a_rollout_that_is_revoked_before_its_first_step_leaves_nothing_behind() -> None:
    actor = an_actor()
    lease = Lease(
        lease_id="4.2.1",
        group_id=4,
        slot=2,
        attempt=1,
        task=Task("words", "train", 0, 9),
        sampling=Sampling(max_tokens=4),
        progress_timeout_seconds=60.0,
    )
    async with asyncio.TaskGroup() as tasks:
        actor._start(tasks, lease)
        assert actor.held_leases() == ["4.2.1"]
        actor._revoke(pb.RevokeLeases(lease_ids=["4.2.1"]))
    await asyncio.sleep(0)
    assert actor.held_leases() == []
