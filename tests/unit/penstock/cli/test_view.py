import io

import pytest
from rich.console import Console, RenderableType

from penstock.cli.view import RewardHistory, line, render
from penstock.rpc import to_duration
from penstock.v1 import coordinator_pb2, trajectory_pb2
from penstock.v1 import operator_pb2 as pb


def drawn(view: RenderableType, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(view)
    return out.getvalue()


def version(step: int) -> trajectory_pb2.PolicyVersion:
    return trajectory_pb2.PolicyVersion(epoch=1, step=step)


def a_status() -> pb.GetStatusResponse:
    return pb.GetStatusResponse(
        run_id="3f2a9c1d",
        state=pb.RUN_STATE_RUNNING,
        version=version(37),
        num_steps=100,
        max_lag=4,
        actors=[
            pb.ActorStatus(
                actor_id="actor-1",
                state="ready",
                installed=version(35),
                num_leases=32,
                since_heartbeat=to_duration(0.4),
                stats=coordinator_pb2.EngineStats(tokens_per_second=1234),
                weights=coordinator_pb2.WeightsUse(medium="zeromq"),
            ),
        ],
        ledger=pb.LedgerStatus(accepted=5120, trained=4736, pending=371, surplus=13, max_lag_trained=3),
        metrics={"reward_mean": 0.8125, "lag_mean": 2.14, "lag_max": 3},
        waiting_for="the learner waits since 0.2 s for 3 groups of step 37",
        uptime=to_duration(3683),
        tokens_per_second=1234.4,
        environments=[
            pb.EnvironmentStatus(name="spell_backward", address="127.0.0.1:7081", num_trajectories=5120)
        ],
        num_groups_open=12,
        num_groups_ready=3,
        actors_wanted=3,
    )


def test_the_view_says_what_a_run_does() -> None:
    text = drawn(render(a_status(), RewardHistory()))

    for expected in (
        "run 3f2a9c1d running 1:01:23",
        "1.37",
        "of 100",
        "0.812",
        "max 3 in this step, 3 in any; bound 4",
        "12 groups open, 3 of them ready",
        "the learner waits since 0.2 s for 3 groups of step 37",
    ):
        assert expected in text
    assert row(text, "actor-1") == ["actor-1", "ready", "1.35", "2", "32", "1,234", "0.4", "s", "zeromq"]
    assert row(text, "5,120  ") == ["5,120", "4,736", "371", "0", "13", "0", "0", "0"]
    assert row(text, "spell_backward") == ["spell_backward", "127.0.0.1:7081", "5,120", "0", "0"]


def row(text: str, start: str) -> list[str]:
    (found,) = [line for line in text.splitlines() if line.strip("│ ").startswith(start)]
    return found.strip("│").split()


def test_no_line_is_wider_than_the_terminal() -> None:
    status = a_status()
    status.actors[0].actor_id = "an-actor-with-a-name-that-is-far-too-long-for-any-table"
    status.environments[0].last_fault = "the worker died " * 20

    for width in (80, 120):
        assert max(map(len, drawn(render(status, RewardHistory()), width).splitlines())) <= width
    assert "1,234" in drawn(render(status, RewardHistory()), 80)


def test_a_run_without_version_actors_or_metrics_is_drawn_too() -> None:
    text = drawn(render(pb.GetStatusResponse(state=pb.RUN_STATE_STARTING), RewardHistory()))

    assert "starting" in text
    assert "none yet" in text
    assert "no actor is connected" in text


def test_what_peers_say_is_neither_markup_nor_control() -> None:
    status = a_status()
    status.actors[0].actor_id = "[red]a[/]"
    status.waiting_for = "one\nline \x1b[31m[bold]"

    text = drawn(render(status, RewardHistory()))

    assert "[red]a[/]" in text
    assert "one line  [31m[bold]" in text
    assert "\x1b" not in text


def test_the_newest_evaluation_and_an_open_one_are_shown() -> None:
    status = a_status()
    mean = pb.EvaluationScore(reward_mean=0.625, reward_error=0.03, pass_at={1: 0.6, 4: 0.9})
    newest = pb.EvaluationResult(version=version(4), num_slots=64, num_answers=60, scores={"mean": mean})
    evaluation = pb.EvaluationStatus(open=version(8), num_slots=64, num_answers=12, newest=newest)
    status.evaluation.CopyFrom(evaluation)

    text = drawn(render(status, RewardHistory()), width=120)

    assert row(text, "evaluated")[1] == "0.625"
    assert "version 1.4 (± 0.030), pass@1 0.600, pass@4 0.900" in text
    assert "4 of 64 without a reward" in text


def test_an_imbalance_and_refusals_are_shown() -> None:
    status = a_status()
    status.ledger.imbalance = -2
    status.ledger.duplicates = 7
    status.ledger.rejected["BAD_LENGTHS"] = 3

    text = drawn(render(status, RewardHistory()))

    assert row(text, "5,120  ")[-1] == "-2"
    assert "rejected: 3 BAD_LENGTHS; sent twice: 7" in text


def test_broadcasts_are_shown_once_there_are_any() -> None:
    status = a_status()
    assert "broadcast" not in drawn(render(status, RewardHistory()))
    status.actors[0].weights.medium = "broadcast"
    status.broadcasts.state, status.broadcasts.backend = "sending", "nccl"
    status.broadcasts.num_members, status.broadcasts.num_groups, status.broadcasts.num_broadcasts = 3, 1, 1204
    text = drawn(render(status, RewardHistory()))
    assert row(text, "actor-1")[-1] == "broadcast"
    assert "broadcasts: 1,204 versions; 3 actors (nccl) sending" in text

    status.broadcasts.fallbacks["lost"] = 2
    status.broadcasts.num_members, status.broadcasts.state = 0, "none"
    text = drawn(render(status, RewardHistory()), width=120)
    assert "1,204 versions; no group; pulled instead: 2 lost" in text


def test_faults_of_environments_are_named() -> None:
    status = a_status()
    status.environments[0].infrastructure_faults = 2
    status.environments[0].data_faults = 1
    status.environments[0].last_fault = "the worker died"

    text = drawn(render(status, RewardHistory()))

    assert row(text, "spell_backward  ")[-2:] == ["3", "1"]
    assert "spell_backward: the worker died" in text


def test_a_sparkline_has_a_block_a_step_until_there_is_no_room() -> None:
    rewards = RewardHistory()
    assert rewards.sparkline(8) == ""
    for step in range(8):
        add(rewards, step, step / 7)

    assert rewards.sparkline(8) == "▁▂▃▄▅▆▇█"
    assert rewards.sparkline(4) == "▁▃▅▇"


def test_a_step_seen_twice_is_one_block() -> None:
    rewards = RewardHistory()
    for _ in range(3):
        add(rewards, 1, 1.0)

    assert rewards.sparkline(8) == "█"


def test_negative_rewards_lower_the_floor() -> None:
    rewards = RewardHistory()
    add(rewards, 1, -1.0)
    add(rewards, 2, 0.0)

    assert rewards.sparkline(8) == "▁▅"


def add(rewards: RewardHistory, step: int, reward: float) -> None:
    rewards.add(pb.GetStatusResponse(version=version(step), metrics={"reward_mean": reward}))


def test_a_line_of_a_run_without_a_version_says_so() -> None:
    assert line(pb.GetStatusResponse(num_steps=100)).startswith("version none yet of 100  reward -")


@pytest.mark.parametrize("with_metrics", [True, False])
def test_a_line_for_logs(with_metrics: bool) -> None:
    status = a_status()
    if not with_metrics:
        status.metrics.clear()

    reward, lag, most = ("0.812", "2.1", "3") if with_metrics else ("-", "0.0", "0")
    assert line(status) == (
        f"version 1.37 of 100  reward {reward}  lag {lag} (max {most} of 4)  1,234 tokens/s  actors 1 of 3 wanted  "
        "trained 4,736  pending 371  imbalance 0"
    )
