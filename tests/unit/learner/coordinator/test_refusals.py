import logging

import grpc
import pytest

from learner.coordinator.refusals import Refused

FAILED, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT


def test_every_refused_call_is_counted_and_one_a_second_of_each_kind_is_logged(
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    refused = Refused()
    for number in range(1000):
        refused.note(INVALID, "ipv4:10.0.0.1:1", ValueError("protocol 999"), now=100.0 + number / 1000)
    refused.note(FAILED, "ipv4:10.0.0.2:1", ValueError("no such session"), now=100.5)
    refused.note(INVALID, "ipv4:10.0.0.1:1", ValueError("protocol 999"), now=101.5)
    assert refused.by_status == {"INVALID_ARGUMENT": 1001, "FAILED_PRECONDITION": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "refused ipv4:10.0.0.1:1 (1 INVALID_ARGUMENT so far): protocol 999",
        "refused ipv4:10.0.0.2:1 (1 FAILED_PRECONDITION so far): no such session",
        "refused ipv4:10.0.0.1:1 (1001 INVALID_ARGUMENT so far): protocol 999",
    ]
