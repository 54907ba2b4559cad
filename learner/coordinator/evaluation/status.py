"""Evaluations as operators see them: in status, and as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from learner.coordinator.evaluation.evaluations import Evaluations
from learner.coordinator.evaluation.result import EvaluationResult
from penstock.codec import version_to_wire
from penstock.rpc import to_duration
from penstock.scores import Score
from penstock.v1 import operator_pb2 as pb


def evaluation_to_wire(evaluations: Evaluations, now: float) -> pb.EvaluationStatus | None:
    """None in a run that evaluates nothing, and has never."""
    evaluation, newest = evaluations.open, evaluations.newest
    if evaluation is None and newest is None:
        return None
    status = pb.EvaluationStatus(newest=None if newest is None else _result_to_wire(newest))
    if evaluation is not None:
        status.open.CopyFrom(version_to_wire(evaluation.version))
        status.num_slots, status.num_answers = evaluation.num_slots, evaluation.num_answers
        status.num_holders = len(evaluations.holders)
        status.left.CopyFrom(to_duration(evaluations.seconds_left(now)))
    return status


def evaluation_metrics(evaluations: Evaluations) -> Iterator[Metric]:
    """Runs in the HTTP thread: reads each attribute once."""
    evaluation, newest = evaluations.open, evaluations.newest
    yield _gauge("penstock_evaluation_open", "1 while an evaluation is open.", evaluation is not None)
    yield _gauge("penstock_evaluation_holders", "Actors that hold its version.", len(evaluations.holders))
    if newest is None:
        return
    yield _gauge("penstock_evaluation_step", "Version of the newest result.", newest.version.step)
    yield _gauge("penstock_evaluation_missing", "Answers that it lacks.", newest.num_missing)
    yield _gauge(
        "penstock_evaluation_faults", "Questions given up after faults.", sum(newest.faults.values())
    )
    found = GaugeMetricFamily("penstock_evaluation", "The newest result.", labels=["environment", "measure"])
    for environment, score in newest.scores.items():
        for measure, value in _measures(score):
            found.add_metric([environment, measure], value)
    yield found


def _measures(score: Score | None) -> Iterator[tuple[str, float]]:
    if score is None:
        return
    yield "reward_mean", score.reward_mean
    if score.reward_error is not None:
        yield "reward_error", score.reward_error
    for k, chance in score.pass_at.items():
        if chance is not None:
            yield f"pass_at_{k}", chance
    yield "truncated_share", score.truncated_share
    yield "tokens_mean", score.tokens_mean


def _result_to_wire(result: EvaluationResult) -> pb.EvaluationResult:
    return pb.EvaluationResult(
        version=version_to_wire(result.version),
        state=result.state,
        num_slots=result.num_slots,
        num_answers=result.num_answers,
        num_missing=result.num_missing,
        num_faults=sum(result.faults.values()),
        scores={name: _score_to_wire(score) for name, score in result.scores.items() if score is not None},
    )


def _score_to_wire(score: Score) -> pb.EvaluationScore:
    return pb.EvaluationScore(
        reward_mean=score.reward_mean,
        reward_error=score.reward_error,
        pass_at={k: chance for k, chance in score.pass_at.items() if chance is not None},
        truncated_share=score.truncated_share,
        tokens_mean=score.tokens_mean,
    )


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=value)
