"""Answers as they are submitted: may one count, and what the ledger keeps of it. Pure."""

from __future__ import annotations

from learner.coordinator.evaluation.evaluation import Evaluation
from learner.coordinator.evaluation.records import AnswerState, EvaluationAnswered
from learner.coordinator.submissions import Submission
from learner.coordinator.validation import Rejected, RejectionCode, check_observation, check_task
from penstock.scores import Answer
from penstock.v1 import trajectory_pb2


def check(submission: Submission, evaluation: Evaluation, slot: int) -> None:
    """Checks that it is of the evaluation's version to the last token, and of the slot's question. Raises Rejected."""
    if any(span.version != evaluation.version for span in submission.versions):
        names = ", ".join(str(span.version) for span in submission.versions[:8])
        raise Rejected(
            RejectionCode.WRONG_VERSION,
            f"its tokens are of {names}; an evaluation's must all be of {evaluation.version}",
        )
    check_task(submission.task, evaluation.plan.questions[slot].task)
    most = evaluation.plan.max_tokens
    if submission.num_sampled > most:
        raise Rejected(
            RejectionCode.TOO_LONG, f"{submission.num_sampled} sampled tokens; at most {most} are allowed"
        )
    check_observation(submission.observation_digest, evaluation.observation_of(slot))


def answer_of(submission: Submission) -> Answer:
    return Answer(
        prompt=submission.task.index,
        reward=submission.reward,
        num_tokens=submission.num_sampled,
        truncated=_is_truncated(submission),
    )


def record_of(
    submission: Submission, lease: tuple[int, int, int], session_id: str, sequence: int, state: AnswerState
) -> EvaluationAnswered:
    """lease: (number, slot, attempt)."""
    number, slot, attempt = lease
    return EvaluationAnswered(
        number=number,
        slot=slot,
        attempt=attempt,
        trajectory_id=submission.trajectory_id,
        session_id=session_id,
        sequence=sequence,
        state=state,
        environment=submission.task.environment,
        task_index=submission.task.index,
        versions=submission.versions,
        num_sampled=submission.num_sampled,
        reward=submission.reward,
        truncated=_is_truncated(submission),
    )


def _is_truncated(submission: Submission) -> bool:
    message = trajectory_pb2.Trajectory.FromString(submission.payload)
    return message.finish_reason == trajectory_pb2.FINISH_REASON_LENGTH
