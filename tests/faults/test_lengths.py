"""Long rollouts are trained as often as they are made: the bound on lag discards nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from penstock.trajectory import Lease

from .bench import PATIENT_FLEET, Bench, FaultLength
from .scripted_actor import Script

MOST_TOKENS = 400


def heavy_tailed(lease: Lease) -> int:
    """Pareto with exponent 1.2, cut at MOST_TOKENS: a function of the lease's slot."""
    digest = hashlib.sha256(f"{lease.group_id}.{lease.slot}".encode()).digest()
    uniform = (int.from_bytes(digest[:8], "little") + 1) / (2**64 + 1)
    return min(int(3 * uniform ** (-1 / 1.2)), MOST_TOKENS)


async def test_trained_lengths_are_distributed_as_generated_ones(tmp_path: Path, fault_length: FaultLength):
    num_steps = fault_length.of(short=40, long=400)
    script = Script(num_tokens=heavy_tailed, token_seconds=0.002)
    async with Bench(
        tmp_path, num_steps=num_steps, groups_per_step=4, max_lag=4, fleet=PATIENT_FLEET
    ) as bench:
        await bench.start()
        actors = [bench.actor(name, script=script, num_slots=32) for name in ("a1", "a2")]
        await bench.trained()
        bench.check()
        trained = [n for (n,) in bench.rows("SELECT num_sampled FROM trajectories WHERE state = 'trained'")]
        generated = [length for actor in actors for length in actor.player.lengths]
        tally = bench.tally()
        lags = [lag for (lag,) in bench.rows("SELECT lag FROM trajectories WHERE state = 'trained'")]
        cut = bench.rows("SELECT count(*) FROM trajectories WHERE num_sampled >= 400 AND state = 'trained'")
    assert tally.get("stale", 0) == tally.get("group_dropped", 0) == 0, "none is discarded for its age"
    assert len(trained) == num_steps * 4 * 4
    assert max(lags) <= 4
    assert cut[0][0] > 0, "the longest are among them"
    assert kolmogorov_smirnov(trained, generated) < critical(len(trained), len(generated))


def kolmogorov_smirnov(left: list[int], right: list[int]) -> float:
    """The largest distance of two empirical distribution functions."""
    places = np.unique(left + right)
    shares = [np.searchsorted(np.sort(each), places, side="right") / len(each) for each in (left, right)]
    return float(np.abs(shares[0] - shares[1]).max())


def critical(num_left: int, num_right: int) -> float:
    """Of the two-sample test at 5 %."""
    return float(1.358 * np.sqrt((num_left + num_right) / (num_left * num_right)))


def test_the_test_tells_a_truncated_distribution_from_a_whole_one() -> None:
    rng = np.random.default_rng(0)
    whole = [int(3 * rng.random() ** (-1 / 1.2)) for _ in range(640)]
    without_the_long = [length for length in whole if length < 15]
    assert kolmogorov_smirnov(whole, whole) == 0
    assert kolmogorov_smirnov(whole, without_the_long) > critical(len(whole), len(without_the_long))
