"""The process that runs an environment's code: one call at a time, under limits.

`python -P -m environments.worker FD` reads frames from the inherited socket FD:

    start     what to load, and the limits     -> its description
    prompt, score                              of a SingleTurnEnvironment
    prompt, score_batch                        of a BatchedEnvironment
    reset, step, close                         of an Environment

Each answer is {"ok": ...} or {"fault": {"kind", "message"}}. Whatever takes too long is
ended from outside, with SIGKILL.
"""

from __future__ import annotations

import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, cast

from environments import frames
from environments.base import AnyEnvironment, BatchedEnvironment, Environment, Form, SingleTurnEnvironment
from environments.frames import Json
from environments.loading import form_of, load
from penstock.errors import ConfigError, EnvironmentFault, FaultKind
from penstock.parent import send_at_parents_death


class Worker:
    """Holds the environment, and answers calls on it."""

    def __init__(self, start: Json) -> None:
        self._target: str = start["target"]
        self._options: Mapping[str, Any] = start["options"]
        self._environment: AnyEnvironment | None = load(self._target, self._options)
        self._form = form_of(self._environment)
        calls: dict[Form, dict[str, Callable[[Json], object]]] = {
            Form.STEPPED: {"reset": self._reset, "step": self._step, "close": self._close},
            Form.SINGLE_TURN: {"prompt": self._prompt, "score": self._score},
            Form.BATCHED: {"prompt": self._prompt, "score_batch": self._score_batch},
        }
        self._calls = calls[self._form]

    def describe(self) -> Json:
        assert self._environment is not None
        description = frames.description_to_json(self._environment.describe())
        return {"ok": {"description": description, "form": self._form}}

    def answer(self, request: Json) -> Json:
        """An exception costs a stepped environment its object: the next reset builds another."""
        call: str = request["call"]
        try:
            _limit_processor(request["seconds"])
            reply: Json = {"ok": self._calls[call](request)}
            frames.encode(reply)
            return reply
        except EnvironmentFault as fault:
            failure = _fault(fault.kind, str(fault))
        except Exception as error:  # noqa: BLE001  the boundary to code that nobody vouches for
            traceback.print_exc()
            failure = _fault(
                FaultKind.INFRASTRUCTURE, f"{self._target}, in {call}: {type(error).__name__}: {error}"
            )
        if self._form is Form.STEPPED:
            self._environment = None
        return failure

    def _prompt(self, request: Json) -> object:
        environment = cast(SingleTurnEnvironment, self._environment)
        return frames.messages_to_json(environment.prompt(frames.task_from_json(request["task"])))

    def _score(self, request: Json) -> object:
        environment = cast(SingleTurnEnvironment, self._environment)
        task = frames.task_from_json(request["task"])
        return frames.result_to_json(environment.score(task, request["action"]))

    def _score_batch(self, request: Json) -> object:
        environment = cast(BatchedEnvironment, self._environment)
        answers = [(frames.task_from_json(task), action) for task, action in request["answers"]]
        return [frames.result_to_json(result) for result in environment.score_batch(answers)]

    def _reset(self, request: Json) -> object:
        if self._environment is None:
            self._environment = load(self._target, self._options)
        environment = cast(Environment, self._environment)
        return frames.messages_to_json(environment.reset(frames.task_from_json(request["task"])))

    def _step(self, request: Json) -> object:
        return frames.result_to_json(cast(Environment, self._environment).step(request["action"]))

    def _close(self, request: Json) -> object:
        if self._environment is not None:
            cast(Environment, self._environment).close()
        return None


def main(file_descriptor: int) -> None:
    channel = socket.socket(fileno=file_descriptor)
    channel.set_inheritable(False)
    # A killed server leaves no worker behind.
    send_at_parents_death(signal.SIGKILL)
    start = frames.receive_frame(channel)
    if start is None:
        return
    _limit_resources(start["limits"])
    sys.path.insert(0, start["folder"])
    try:
        worker = Worker(start)
        description = worker.describe()
    except ConfigError as error:
        channel.sendall(frames.encode(_fault("config", str(error))))
        return
    channel.sendall(frames.encode(description))
    while (request := frames.receive_frame(channel)) is not None:
        channel.sendall(frames.encode(worker.answer(request)))


def _fault(kind: str, message: str) -> Json:
    return {"fault": {"kind": str(kind), "message": message[:2000].encode(errors="replace").decode()}}


def _limit_resources(limits: Json) -> None:
    """Memory, open files, no core dumps. Processor time is limited call by call."""
    _limit(resource.RLIMIT_DATA, limits["memory_bytes"])
    _limit(resource.RLIMIT_NOFILE, limits["num_files"])
    _limit(resource.RLIMIT_CORE, 0)


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _limit_processor(seconds: float) -> None:
    """Should nobody be left to end this call, the kernel does."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(
        resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
