"""`penstock env serve` and `check`, as processes."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from environments.client import EnvironmentClient
from penstock.errors import EnvironmentFault
from penstock.trajectory import Task
from tests.integration.environment_servers import CHECKOUT, command, run

EXAMPLES = CHECKOUT / "examples" / "environments"


def test_a_reasoning_gym_task_is_served_keeps_every_rule_and_drains() -> None:
    flags = [
        "--config.min_word_len",
        "4",
        "--config.max_word_len",
        "5",
        "--num-train",
        "50",
        "--num-eval",
        "10",
    ]
    with command("reasoning_gym:spell_backward", *flags, "--prompt", "{word}=") as (process, address):
        checked = run("check", address)
        assert "FAIL" not in checked.stdout
        assert checked.returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def test_a_file_of_questions_is_served_and_keeps_every_rule(tmp_path: Path) -> None:
    rows = [{"question": f"{a} + 1?", "answer": f"#### {a + 1}"} for a in range(30)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with command("question_answer:sums.jsonl", folder=tmp_path) as (process, address):
        checked = run("check", address, "--split", "eval")
        assert "FAIL" not in checked.stdout
        assert checked.returncode == 0
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0


def test_a_class_from_the_current_folder_is_served_and_keeps_every_rule() -> None:
    options = ["--option", "highest=20", "max_guesses=3", "--workers", "2"]
    with command("number_guessing:NumberGuessing", *options, folder=EXAMPLES) as (_, address):
        checked = run("check", address)
        assert "FAIL" not in checked.stdout
        assert checked.returncode == 0


def test_a_server_that_is_killed_leaves_no_worker_behind() -> None:
    with command("number_guessing:NumberGuessing", "--workers", "2", folder=EXAMPLES) as (process, _):
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.kill()
        process.wait(timeout=10)
        psutil.wait_procs(workers, timeout=10)
        assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


async def test_a_step_that_hangs_does_not_hold_up_a_drain() -> None:
    task = Task("hostile", "train", 0, 0)
    with command("tests.integration.hostile_environments:Hostile", "--workers", "1") as (process, address):
        async with (
            EnvironmentClient(address) as client,
            client.session(session_id="a", fence=1, task=task) as episode,
        ):
            step = asyncio.ensure_future(episode.step("say and hang"))
            await _line_of(process, "printed: hanging")
            process.terminate()
            assert process.wait(timeout=10) == 0
            with pytest.raises(EnvironmentFault):
                await step


async def _line_of(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    while text not in await asyncio.to_thread(process.stderr.readline):
        assert process.poll() is None


def test_a_server_stops_while_it_still_loads(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('loading')\ntime.sleep(600)\n", encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock.cli", "env", "serve", "slow:Game", "--bind", "127.0.0.1:0"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stderr is not None
    assert "printed: loading" in process.stderr.readline()
    process.terminate()
    assert process.wait(timeout=10) == 0
    process.communicate()


BROKEN_LINE = '{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "1 + 2?"}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "usage: penstock env"),
        (["serve", "spell_backward"], "names no environment"),
        (["serve", "reasoning_gym:countdown"], "runs the answer as Python"),
        (["serve", "reasoning_gym:spell_backward", "--config.min_word", "4"], "did you mean 'min_word_len'"),
        (["serve", "reasoning_gym:spell_backward", "--config", "4"], "expected KEY=VALUE"),
        (["serve", "reasoning_gym:spell_backward", "--num-trian", "4"], "--num-train"),
        (["serve", "reasoning_gym:spell_backward", "--bind", "0.0.0.0:0"], "not a loopback address"),
        (["serve", "question_answer:broken.jsonl"], "broken.jsonl, line 2: has no 'answer'"),
        (["serve", "question_answer:missing.jsonl"], "missing.jsonl cannot be read"),
        (["serve", "no_such_module:Game"], "no module 'no_such_module'"),
        (["serve", "json:JSONDecoder"], "has no method 'describe'"),
        (["check", "127.0.0.1:1", "--timeout-seconds", "1"], "does not answer Describe"),
        (["check", "nowhere"], "expected HOST:PORT"),
    ],
)
def test_bad_input_is_one_clear_message_and_status_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "broken.jsonl").write_text(BROKEN_LINE, encoding="utf-8")
    # Else on the usual port, which another program may have.
    is_served = arguments[0] == "serve" and len(arguments) > 1 and "--bind" not in arguments
    finished = run(*arguments, *(["--bind", "127.0.0.1:0"] if is_served else []), folder=tmp_path)
    assert finished.returncode == 2
    assert message in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_port_in_use_is_one_clear_message_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        finished = run("serve", "number_guessing:NumberGuessing", "--bind", address, folder=EXAMPLES)
    assert finished.returncode == 2
    assert f"cannot listen on {address}" in finished.stderr
    assert "Traceback" not in finished.stderr
