"""Who is killed when, and how long the run takes to get over it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.chaos.killer import Killer, Victim, descendants
from penstock.chaos.report import percentile
from penstock.chaos.settings import ChaosConfig
from penstock.errors import ConfigError
from penstock.v1 import operator_pb2 as pb
from penstock.v1.trajectory_pb2 import PolicyVersion


@dataclass
class FakeActor:
    killed: bool = False

    def kill(self) -> None:
        self.killed = True


@dataclass
class FakeQuickstart:
    """Whose actors alone can be killed: everything else is away just now."""

    actors: list[FakeActor] = field(default_factory=lambda: [FakeActor(), FakeActor()])
    now: float = 0.0
    ready: bool = True

    async def start_actor(self) -> None:
        self.actors.append(FakeActor())


def killer_of(quickstart: FakeQuickstart, monkeypatch: pytest.MonkeyPatch, **changes: float) -> Killer:
    killer = Killer(
        quickstart,  # type: ignore[arg-type]
        minutes=changes.get("minutes", 1.0),
        every_seconds=15.0,
        seed=0,
        may_begin=lambda: quickstart.ready,
        say=lambda text: None,
        clock=lambda: quickstart.now,
    )
    monkeypatch.setattr(killer, "_random", SimpleNamespace(choice=_an_actor))
    return killer


def _an_actor(choices: list[object]) -> object:
    return Victim.ACTOR if Victim.ACTOR in choices else choices[0]


def at(step: int) -> pb.GetStatusResponse:
    return pb.GetStatusResponse(version=PolicyVersion(epoch=1, step=step), num_steps=100)


async def test_one_is_killed_at_once_and_every_fifteen_seconds_until_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
):
    quickstart = FakeQuickstart()
    killer = killer_of(quickstart, monkeypatch)
    assert killer.was_cut_short
    for second in range(120):
        quickstart.now = 100.0 + second
        await killer.look(at(0))
        assert killer.was_cut_short == (second < 60)
    assert [kill.seconds for kill in killer.kills] == [0.0, 15.0, 30.0, 45.0, 60.0]
    assert sum(actor.killed for actor in quickstart.actors) == 5
    assert sum(not actor.killed for actor in quickstart.actors) == 2, "each was started again"


async def test_recovery_lasts_until_the_run_is_further_than_it_was(monkeypatch: pytest.MonkeyPatch):
    quickstart = FakeQuickstart()
    killer = killer_of(quickstart, monkeypatch, minutes=0.1)
    for now, step in ((0.0, 8), (5.0, 4), (10.0, 8), (12.0, 9), (25.0, 12)):
        quickstart.now = now
        await killer.look(at(step))
    (kill,) = killer.kills
    assert (kill.step, kill.recovery_seconds) == (8, 12.0)


async def test_nobody_is_killed_before_it_may_begin_nor_at_the_very_end(monkeypatch: pytest.MonkeyPatch):
    quickstart = FakeQuickstart(ready=False)
    killer = killer_of(quickstart, monkeypatch)
    await killer.look(at(3))
    assert not killer.kills
    quickstart.now, quickstart.ready = 100.0, True
    await killer.look(at(99))
    await killer.look(None)
    assert not killer.kills
    await killer.look(at(50))
    assert len(killer.kills) == 1


def test_descendants_are_found_below_children() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as parent:
        while len(found := descendants(parent.pid)) < 1:
            assert parent.poll() is None
        assert parent.pid not in found
        assert all(Path(f"/proc/{pid}").exists() for pid in found)
        parent.communicate(b"\n", timeout=60)


def test_percentiles_are_of_what_was_measured() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 99) == 4.0


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="minutes is 0"):
        ChaosConfig(minutes=0)


def test_results_that_could_not_be_written_are_refused_before_the_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "chaos.json"):
        with pytest.raises(ConfigError, match="expected a file in a folder that exists"):
            ChaosConfig(json=path)
    assert ChaosConfig(json=tmp_path / "chaos.json").json


def test_a_machine_that_is_twice_as_fast_gets_twice_the_steps_but_no_run_is_shorter_than_the_quickstart() -> (
    None
):
    config = ChaosConfig(minutes=10)

    assert config.steps_for(warm_start_seconds=30.0) == 2 * config.steps_for(warm_start_seconds=60.0) == 2250
    assert ChaosConfig(minutes=0.1).steps_for(warm_start_seconds=30.0) == 120
