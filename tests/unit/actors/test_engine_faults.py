from actors.engine_faults import EngineFaults


def test_rollouts_that_fail_together_are_one_failure_and_a_finished_one_ends_the_count():
    faults = EngineFaults()
    assert not any(faults.failed(began=0.0, now=10.0) for _ in range(64))
    assert not any(faults.failed(began=11.0, now=12.0) for _ in range(7))

    faults.finished()

    assert not any(faults.failed(began=13.0, now=14.0) for _ in range(7))


def test_an_engine_that_fails_whatever_begins_after_its_first_failure_is_given_up():
    faults = EngineFaults()
    faults.failed(began=0.0, now=10.0)
    assert [faults.failed(began=11.0, now=12.0) for _ in range(8)] == [False] * 7 + [True]
