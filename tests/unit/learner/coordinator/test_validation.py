import numpy as np
import pytest

from learner.coordinator import validation
from learner.coordinator.validation import Rejected, RejectionCode
from penstock.trajectory import Lease, PolicyVersion, Reward, RewardStatus, Sampling, Task, VersionSpan

from .fakes import LIMITS, make_message, read

VERSION = PolicyVersion(1, 0)
LEASE = Lease(
    lease_id="0.0.0",
    group_id=0,
    slot=0,
    attempt=0,
    task=Task("words", "train", 0, 1),
    sampling=Sampling(),
    progress_timeout_seconds=60.0,
)


def code_of(**changes: object) -> RejectionCode | None:
    try:
        submission = read(make_message(LEASE, VERSION, **changes))
        if isinstance(submission, Rejected):
            raise submission
        if submission.flaw is not None:
            raise submission.flaw
        validation.check_versions(submission.versions, {VERSION})
        validation.check_task(submission.task, LEASE.task)
    except Rejected as rejected:
        return rejected.code
    return None


def test_a_well_formed_trajectory_passes():
    assert code_of() is None


@pytest.mark.parametrize("name", ["", "7", "G" * 32, "a" * 33, "A" * 32])
def test_an_id_is_32_hexadecimal_digits(name: str):
    assert code_of(trajectory_id=name) is RejectionCode.BAD_ID


@pytest.mark.parametrize("field", ["token_ids", "loss_mask", "logprobs"])
def test_arrays_agree_in_length(field: str):
    message = make_message(LEASE, VERSION)
    for cut in (0, 1, 4):
        broken = type(message)()
        broken.CopyFrom(message)
        setattr(broken, field, getattr(message, field)[:cut])
        rejected = read(broken)
        assert isinstance(rejected, Rejected)
        assert rejected.code is RejectionCode.BAD_LENGTHS
        assert rejected.lease_id == LEASE.lease_id


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_log_probabilities_are_finite(value: float):
    logprobs = np.array([0, 0, value, -1, -1], dtype=np.float32)
    assert code_of(logprobs=logprobs) is RejectionCode.NON_FINITE_LOGPROB


def test_log_probabilities_are_at_most_zero():
    logprobs = np.array([0, 0, 0.01, -1, -1], dtype=np.float32)
    assert code_of(logprobs=logprobs) is RejectionCode.POSITIVE_LOGPROB


@pytest.mark.parametrize("token", [-1, LIMITS.vocab_size, 2**31 - 1])
def test_token_ids_are_in_the_vocabulary(token: int):
    assert (
        code_of(token_ids=np.array([1, 2, 3, 4, token], dtype=np.int32)) is RejectionCode.TOKEN_OUT_OF_RANGE
    )


@pytest.mark.parametrize("mask", [[0, 0, 0, 0, 0], [0, 0, 1, 1, 2], [1, 1, 1, 1, 1]])
def test_a_mask_marks_sampled_tokens_after_a_prompt(mask: list[int]):
    assert code_of(loss_mask=np.array(mask, dtype=np.uint8)) is RejectionCode.BAD_MASK


@pytest.mark.parametrize(
    ("spans", "code"),
    [
        ((), RejectionCode.BAD_VERSIONS),
        ((VersionSpan(VERSION, 2),), RejectionCode.BAD_VERSIONS),
        ((VersionSpan(VERSION, 4),), RejectionCode.BAD_VERSIONS),
        ((VersionSpan(VERSION, 3), VersionSpan(VERSION, 0)), RejectionCode.BAD_VERSIONS),
        ((VersionSpan(VERSION, 1), VersionSpan(VERSION, 2)), RejectionCode.BAD_VERSIONS),
        ((VersionSpan(PolicyVersion(9, 9), 3),), RejectionCode.UNKNOWN_VERSION),
    ],
)
def test_versions_cover_the_sampled_tokens_and_were_published(
    spans: tuple[VersionSpan, ...], code: RejectionCode
):
    assert code_of(versions=spans) is code


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rewards_are_finite(value: float):
    assert code_of(reward=Reward.valid(value)) is RejectionCode.BAD_REWARD


@pytest.mark.parametrize("status", [status for status in RewardStatus if status is not RewardStatus.VALID])
def test_only_a_valid_reward_is_trained_on(status: RewardStatus):
    assert code_of(reward=Reward(status=status)) is RejectionCode.BAD_REWARD


def test_a_valid_reward_has_a_value():
    message = make_message(LEASE, VERSION)
    message.reward.ClearField("value")
    rejected = read(message)
    assert isinstance(rejected, Rejected)
    assert rejected.code is RejectionCode.BAD_REWARD


def test_metrics_are_finite():
    assert code_of(metrics={"steps": float("nan")}) is RejectionCode.BAD_REWARD


def test_episodes_stay_within_the_limits():
    sampled = LIMITS.max_sampled_tokens + 1
    arrays = {
        "token_ids": np.ones(sampled + 1, dtype=np.int32),
        "loss_mask": np.array([0] + [1] * sampled, dtype=np.uint8),
        "logprobs": np.zeros(sampled + 1, dtype=np.float32),
        "versions": (VersionSpan(VERSION, sampled),),
    }
    assert code_of(**arrays) is RejectionCode.TOO_LONG


def test_the_task_is_the_one_that_was_leased():
    assert code_of(task=Task("words", "train", 1, 1)) is RejectionCode.WRONG_TASK


def test_members_of_a_group_saw_the_same_observation():
    validation.check_observation("a", None)
    validation.check_observation("a", "a")
    with pytest.raises(Rejected, match="equal tasks"):
        validation.check_observation("a", "b")
