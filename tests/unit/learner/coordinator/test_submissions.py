import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from learner.coordinator import submissions
from learner.coordinator.submissions import Arrays, Sent, Submission, check_arrays
from learner.coordinator.validation import Rejected, RejectionCode
from penstock.codec import checksum
from penstock.trajectory import Lease, PolicyVersion, Sampling, Task

from .fakes import LIMITS, make_message

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


def sent(**changes: object) -> Sent:
    payload = make_message(LEASE, VERSION, **changes).SerializeToString()
    return Sent(payload, checksum(payload))


def test_a_submission_keeps_the_bytes_that_were_sent():
    one = sent()
    (submission,) = submissions.read([one], LIMITS)
    assert isinstance(submission, Submission)
    assert submission.payload is one.payload
    assert submission.flaw is None
    assert (submission.lease_id, submission.task, submission.reward) == ("0.0.0", LEASE.task, 1.0)
    assert (submission.oldest, submission.num_sampled, submission.is_mixed) == (VERSION, 3, False)


def test_every_flipped_bit_is_found():
    payload, stated = sent()
    for place in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[place // 8] ^= 1 << place % 8
        (rejected,) = submissions.read([Sent(bytes(flipped), stated)], LIMITS)
        assert isinstance(rejected, Rejected)
        assert rejected.code is RejectionCode.CORRUPT


def test_a_trajectory_without_a_checksum_is_refused():
    (rejected,) = submissions.read([Sent(sent().payload, 0)], LIMITS)
    assert isinstance(rejected, Rejected)
    assert rejected.code is RejectionCode.CORRUPT


def test_bytes_that_are_no_trajectory_are_refused():
    (rejected,) = submissions.read([Sent(b"\xff", checksum(b"\xff"))], LIMITS)
    assert isinstance(rejected, Rejected)
    assert rejected.code is RejectionCode.CORRUPT


def test_a_task_that_the_ledger_cannot_hold_is_refused():
    (refused,) = submissions.read([sent(task=Task("words", "train", 2**63, 1))], LIMITS)
    assert isinstance(refused, Rejected)
    assert (refused.code, refused.lease_id) == (RejectionCode.WRONG_TASK, "0.0.0")
    (read,) = submissions.read([sent(task=Task("words", "train", 2**63 - 1, 1))], LIMITS)
    assert isinstance(read, Submission)


def test_the_bad_ones_of_a_message_leave_the_good_ones_alone():
    bad_id, bad_token = sent(trajectory_id="7"), sent(token_ids=np.array([1, 2, 3, 4, -1], dtype=np.int32))
    read_together = submissions.read([sent(), bad_id, sent(), bad_token, sent()], LIMITS)
    codes = [
        one.code if isinstance(one, Rejected) else one.flaw and one.flaw.code  # a flaw, or None
        for one in read_together
    ]
    assert codes == [None, RejectionCode.BAD_ID, None, RejectionCode.TOKEN_OUT_OF_RANGE, None]


def test_the_members_of_a_group_share_one_task():
    first, second = submissions.read([sent(), sent()], LIMITS)
    assert isinstance(first, Submission)
    assert isinstance(second, Submission)
    assert first.task is second.task


def test_a_trajectory_reads_the_same_from_the_wire_of_another_language():
    """Fields in another order, and one that this version does not know."""
    message = make_message(LEASE, VERSION)
    tail = type(message)(reward=message.reward, task=message.task).SerializeToString()
    message.ClearField("reward")
    message.ClearField("task")
    payload = tail + message.SerializeToString() + b"\xfa\x7f\x01x"
    (submission,) = submissions.read([Sent(payload, checksum(payload))], LIMITS)
    assert isinstance(submission, Submission)
    assert submission.flaw is None
    assert submission.payload == payload


tokens = st.sampled_from([0, 1, LIMITS.vocab_size - 1, LIMITS.vocab_size, -1, 2**31 - 1, -(2**31)])
logprobs = st.sampled_from([0.0, -0.0, -1.0, -3e38, 1e-45, 1.0, float("nan"), float("inf"), float("-inf")])


@st.composite
def arrays(draw: st.DrawFn) -> Arrays:
    """Sound, or with one element spoiled; at times too long."""
    length = draw(st.integers(2, LIMITS.max_context + 2))
    mask = np.ones(length, dtype=np.uint8)
    mask[: max(length - draw(st.integers(1, LIMITS.max_sampled_tokens + 1)), 1)] = 0
    ids, probs = np.ones(length, dtype=np.int32), np.where(mask == 1, np.float32(-1), np.float32(0))
    place = draw(st.integers(0, length - 1))
    if draw(st.booleans()):
        mask[place] = draw(st.integers(0, 2))
        ids[place] = draw(tokens)
        probs[place] = draw(logprobs)
    return Arrays(ids.tobytes(), mask.tobytes(), probs.tobytes())


@given(st.lists(arrays(), min_size=1, max_size=4))
def test_arrays_checked_together_are_judged_as_each_alone(together: list[Arrays]):
    judged = check_arrays(together, LIMITS)
    alone = [submissions._flaw(one, LIMITS) for one in together]
    assert [flaw and (flaw.code, str(flaw)) for _, flaw in judged] == [
        flaw and (flaw.code, str(flaw)) for flaw in alone
    ]
    for one, (num_sampled, flaw) in zip(together, judged, strict=True):
        assert flaw is not None or num_sampled == np.count_nonzero(np.frombuffer(one.loss_mask, "u1"))
