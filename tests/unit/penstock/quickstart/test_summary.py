import json
from pathlib import Path

import pytest

from penstock.errors import PenstockError
from penstock.quickstart.summary import (
    Evaluated,
    Point,
    draw,
    read_evaluations,
    read_points,
    smoothed,
    trajectories_by_verdict,
)
from penstock.v1 import operator_pb2 as pb


def test_points_are_read_from_the_trainers_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    measured = {"reward_mean": 0.5, "lag_mean": 1.5, "lag_max": 2.0, "loss": 0.1}
    lines = [{"time": 100.0 + 3 * number, "step": number + 1, **measured} for number in (0, 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert read_points(path) == [
        Point(step=1, seconds=0.0, reward=0.5, lag_mean=1.5, lag_max=2.0),
        Point(step=2, seconds=3.0, reward=0.5, lag_mean=1.5, lag_max=2.0),
    ]


@pytest.mark.parametrize("content", [None, "not json\n", '{"time": 1}\n', "[]\n"])
def test_metrics_that_cannot_be_read_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)

    with pytest.raises(PenstockError, match=r"metrics\.jsonl: expected the trainer's metrics"):
        read_points(path)


def test_evaluations_without_an_answer_are_left_out_of_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    score = {"reward_mean": 0.5, "reward_error": 0.1}
    lines = [{"step": 0, "scores": {"mean": score}}, {"step": 4, "scores": {"mean": None}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert read_evaluations(path) == [Evaluated(step=0, reward=0.5, error=0.1)]


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    points = [
        Point(step=i + 1, seconds=float(i), reward=i / 10, lag_mean=1.0, lag_max=2.0) for i in range(10)
    ]

    evaluated = [Evaluated(step=0, reward=0.2, error=0.1), Evaluated(step=7, reward=0.9, error=0.0)]
    draw(points, tmp_path / "reward.png", max_lag=4, killed_at=3.0, evaluated=evaluated)

    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_a_value_is_smoothed_with_its_neighbours() -> None:
    assert smoothed([0.0, 3.0, 6.0, 0.0], span=3) == [1.5, 3.0, 3.0, 3.0]
    assert smoothed([2.0], span=9) == [2.0]


def test_every_fate_of_a_trajectory_is_counted() -> None:
    ledger = pb.LedgerStatus(
        accepted=28, trained=1, pending=2, stale=3, surplus=4, group_dropped=5, quarantined=6, duplicates=7
    )
    ledger.rejected["BAD_ID"] = 8
    ledger.rejected["BAD_MASK"] = 1

    assert trajectories_by_verdict(ledger) == {
        "accepted": 28, "trained": 1, "pending": 2, "stale": 3, "surplus": 4, "group_dropped": 5,
        "quarantined": 6, "duplicate": 7, "rejected": 9,
    }  # fmt: skip
