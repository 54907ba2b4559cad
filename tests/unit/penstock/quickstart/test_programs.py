"""Programs here are scripts of a line or two, run by this interpreter."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.quickstart.programs import Program, ProgramDied, Programs

SLEEP = "import time; print('ready on 127.0.0.1:7', flush=True); time.sleep(600)"
ENDS_IN_ORDER = "print('done')"
FAILS = "import sys; print('the port is in use', file=sys.stderr); sys.exit(2)"


@pytest.fixture
async def programs(tmp_path: Path) -> AsyncIterator[Programs]:
    async with Programs(tmp_path / "logs", command=(sys.executable, "-u", "-c")) as programs:
        yield programs


async def test_a_program_that_is_ready_says_where(programs: Programs) -> None:
    server = await programs.start("server", [SLEEP])

    assert await programs.ready(server, "ready on", timeout_seconds=30) == "127.0.0.1:7"
    programs.check()


async def test_a_program_may_be_run_to_its_end(programs: Programs, tmp_path: Path) -> None:
    await programs.run("once", [ENDS_IN_ORDER], timeout_seconds=30)

    assert (tmp_path / "logs" / "once.log").read_text() == "done\n"


async def test_a_failure_names_the_program_its_status_and_the_end_of_its_log(programs: Programs) -> None:
    with pytest.raises(
        ProgramDied, match=r"(?s)bad ended with status 2; .*bad\.log:\n    the port is in use"
    ):
        await programs.run("bad", [FAILS], timeout_seconds=30)


async def test_while_one_program_is_waited_for_the_death_of_another_is_noticed(programs: Programs) -> None:
    await programs.start("bad", [FAILS])
    server = await programs.start("server", ["import time; time.sleep(600)"])

    with pytest.raises(ProgramDied, match="bad ended with status 2"):
        await programs.ready(server, "ready on", timeout_seconds=30)


async def test_a_server_that_ends_in_order_has_died_all_the_same(programs: Programs) -> None:
    server = await programs.start("server", [ENDS_IN_ORDER])

    with pytest.raises(ProgramDied, match="server ended with status 0"):
        await programs.ready(server, "ready on", timeout_seconds=30)


async def test_a_program_that_is_killed_on_purpose_is_no_failure(programs: Programs) -> None:
    actor = await programs.start("actor", [SLEEP])
    await programs.ready(actor, "ready on", timeout_seconds=30)

    actor.kill()
    await actor.process.wait()
    programs.check()


async def test_a_program_that_is_dismissed_while_it_starts_is_no_failure(programs: Programs) -> None:
    actor = await programs.start("actor", ["import time; time.sleep(600)"], may_finish=True)

    actor.dismiss()
    await programs.finished(actor, timeout_seconds=30)


async def test_a_program_that_a_signal_ends_is_named_with_it(programs: Programs) -> None:
    await programs.start(
        "actor", ["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], may_finish=True
    )
    server = await programs.start("server", ["import time; time.sleep(600)"])

    with pytest.raises(ProgramDied, match="actor was ended by SIGKILL"):
        await programs.ready(server, "ready on", timeout_seconds=30)


async def test_a_wait_ends_at_its_deadline_with_the_name_of_what_was_waited_for(programs: Programs) -> None:
    server = await programs.start("server", ["import time; time.sleep(600)"])

    with pytest.raises(ProgramDied, match=r"server did not print 'ready on' within 0 s"):
        await programs.ready(server, "ready on", timeout_seconds=0.0)
    with pytest.raises(ProgramDied, match="server still runs after 0 s"):
        await programs.finished(server, timeout_seconds=0.0)


async def test_leaving_the_context_stops_clients_first(tmp_path: Path) -> None:
    says_when = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print(time.time()), sys.exit(0)));"
        "print('ready', flush=True); time.sleep(600)"
    )
    async with Programs(tmp_path, command=(sys.executable, "-u", "-c")) as programs:
        started = [
            await programs.start("server", [says_when]),
            await programs.start("client", [says_when], is_client=True),
        ]
        for program in started:
            await programs.ready(program, "ready", timeout_seconds=30)

    assert [program.process.returncode for program in started] == [0, 0]
    stopped = [float(program.log.read_text().split()[-1]) for program in started]
    assert stopped[1] < stopped[0]


async def test_a_program_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.quickstart.programs._SERVER_GRACE_SECONDS", 0.05)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(600)"
    )
    async with Programs(tmp_path, command=(sys.executable, "-u", "-c")) as programs:
        program = await programs.start("deaf", [deaf])
        await programs.ready(program, "ready", timeout_seconds=30)

    assert program.process.returncode == -9


async def test_cancelling_stops_every_program(tmp_path: Path) -> None:
    entered: asyncio.Future[Program] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        async with Programs(tmp_path, command=(sys.executable, "-u", "-c")) as programs:
            server = await programs.start("server", [SLEEP])
            entered.set_result(server)
            await programs.finished(server, timeout_seconds=600)

    task = asyncio.create_task(work())
    server = await entered
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.process.returncode is not None
