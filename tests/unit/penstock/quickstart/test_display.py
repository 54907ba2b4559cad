import io

import pytest
from rich.console import Console

from penstock.quickstart.display import Display
from penstock.v1 import operator_pb2 as pb
from penstock.v1 import trajectory_pb2


def status(step: int, state: pb.RunState.ValueType = pb.RUN_STATE_RUNNING) -> pb.GetStatusResponse:
    version = trajectory_pb2.PolicyVersion(epoch=1, step=step)
    return pb.GetStatusResponse(version=version, state=state, num_steps=9)


def test_plain_output_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=60), plain=True)
    monkeypatch.setattr("penstock.quickstart.display._LINE_SECONDS", 3600.0)

    display.say("made a policy [sic] whose path is too long for a line of this terminal")
    with display.working("warm start"):
        pass
    with display.watching() as show:
        for step in (1, 1, 2, 3):
            show(status(step))
        show(status(9, pb.RUN_STATE_FINISHED))

    said = [line.split(" s  ", 1)[1] for line in out.getvalue().splitlines()]
    assert said[:2] == [
        "made a policy [sic] whose path is too long for a line of this terminal",
        "warm start ...",
    ]
    assert [line.split()[1] for line in said[2:]] == ["1.1", "1.9"]


def test_the_live_view_is_the_last_thing_shown() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=80, force_terminal=True), plain=False)

    with display.watching() as show:
        show(status(1))
        show(status(7))

    assert "1.7" in out.getvalue().rpartition("penstock")[2]
