"""`penstock env serve NAME ...` and `penstock env check ADDRESS`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
import uvloop

from environments import conformance
from environments.base import Description
from environments.server import ServerConfig, serve, spec_of
from penstock import log
from penstock.config import with_switches
from penstock.errors import ConfigError
from penstock.memory import collect_rarely
from penstock.processes import allow_most_files
from penstock.signals import Stop

_USAGE = """\
usage: penstock env COMMAND ...

  serve reasoning_gym:TASK [flags]       a task of the reasoning-gym library
  serve question_answer:FILE.jsonl       questions and answers, graded as mathematics
  serve reward_model:FOLDER              a reward model, on prompts of a file
  serve MODULE:CLASS                     an environment of yours, importable from here
  check HOST:PORT                        run the conformance suite against a server

`penstock env serve reasoning_gym:TASK --help` lists the flags of its kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningGymConfig:
    config: tuple[str, ...] = ()
    """Settings of the library's task, as KEY=VALUE ...; `--config.KEY VALUE` works as well."""
    num_train: int = 2000
    """Training tasks."""
    num_eval: int = 200
    """Held-out tasks: about one question in five is never trained on."""
    seed: int = 0
    prompt: str = ""
    """Template over {question} and the task's metadata, such as "{word}="; empty for the default."""
    answer: Literal["whole", "tags"] = "whole"
    """What is scored: the whole completion, or the text between <answer> and </answer>."""
    server: tyro.conf.OmitArgPrefixes[ServerConfig] = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if self.num_train < 0 or self.num_eval < 0 or self.num_train + self.num_eval == 0:
            raise ConfigError(
                f"num_train is {self.num_train} and num_eval {self.num_eval}; expected 0 or more, and not both 0"
            )

    def target_and_options(self, name: str) -> tuple[str, dict[str, object]]:
        return "environments.reasoning_gym:ReasoningGym", {
            "name": name,
            "config": _key_values("--config", self.config),
            "num_train": self.num_train,
            "num_eval": self.num_eval,
            "seed": self.seed,
            "prompt": self.prompt,
            "answer": self.answer,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnswerConfig:
    question_key: str = "question"
    answer_key: str = "answer"
    eval_fraction: float = 0.1
    """About this share of the questions is held out, by a hash of their text."""
    eval_file: str = ""
    """Hold out this file's questions instead; they are left out of the training file."""
    prompt: str = "{question}"
    """Template over {question}."""
    server: tyro.conf.OmitArgPrefixes[ServerConfig] = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction <= 1:
            raise ConfigError(f"eval_fraction is {self.eval_fraction}; expected 0 to 1")

    def target_and_options(self, name: str) -> tuple[str, dict[str, object]]:
        return "environments.question_answer:QuestionAnswer", {
            "path": str(Path(name).absolute()),
            "question_key": self.question_key,
            "answer_key": self.answer_key,
            "eval_fraction": self.eval_fraction,
            "eval_path": str(Path(self.eval_file).absolute()) if self.eval_file else "",
            "prompt": self.prompt,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelConfig:
    prompts: str
    """A .jsonl or .parquet file."""
    prompt_key: str = "prompt"
    """The field of its rows that holds the prompt: text, or messages."""
    eval_fraction: float = 0.1
    """About this share of the prompts is held out, by a hash of their text."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is cuda where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: int = 16384
    """Tokens, padding included, that the model reads at once."""
    server: tyro.conf.OmitArgPrefixes[ServerConfig] = field(
        default_factory=lambda: ServerConfig(workers=1, memory_mib=32768, scorer_seconds=60.0)
    )

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction <= 1:
            raise ConfigError(f"eval_fraction is {self.eval_fraction}; expected 0 to 1")
        if self.batch_tokens < 1:
            raise ConfigError(f"batch_tokens is {self.batch_tokens}; expected at least 1")

    def target_and_options(self, name: str) -> tuple[str, dict[str, object]]:
        return "environments.reward_model:RewardModel", {
            "path": str(Path(name).absolute()),
            "prompts": str(Path(self.prompts).absolute()),
            "prompt_key": self.prompt_key,
            "eval_fraction": self.eval_fraction,
            "device": self.device,
            "dtype": self.dtype,
            "batch_tokens": self.batch_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassConfig:
    option: tuple[str, ...] = ()
    """Arguments of the class, as KEY=VALUE ...; values that are JSON are read as JSON."""
    server: tyro.conf.OmitArgPrefixes[ServerConfig] = field(default_factory=lambda: ServerConfig(workers=8))

    def target_and_options(self, name: str) -> tuple[str, dict[str, object]]:
        return name, _key_values("--option", self.option)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    split: str = ""
    """Split whose tasks are played; empty for the first one."""
    action: str = "0"
    """What the suite answers in every turn."""
    timeout_seconds: float = 30.0
    """Deadline of each call."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_seconds <= 3600:
            raise ConfigError(
                f"timeout_seconds is {self.timeout_seconds}; expected more than 0, at most 3600"
            )


def main(argv: Sequence[str]) -> int:
    """Returns the exit status. Raises PenstockError."""
    if len(argv) >= 2 and argv[0] == "serve" and not argv[1].startswith("-"):
        return _serve(argv[1], argv[2:])
    if len(argv) >= 2 and argv[0] == "check" and not argv[1].startswith("-"):
        return _check(argv[1], argv[2:])
    asked = any(argument in ("-h", "--help") for argument in argv)
    print(_USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _serve(name: str, argv: Sequence[str]) -> int:
    kind, separator, rest = name.partition(":")
    if not separator or not rest:
        raise ConfigError(
            f"{name!r} names no environment; expected reasoning_gym:TASK, question_answer:FILE.jsonl, "
            "reward_model:FOLDER or MODULE:CLASS"
        )
    config_type: Callable[..., Any] = {
        "reasoning_gym": ReasoningGymConfig,
        "question_answer": QuestionAnswerConfig,
        "reward_model": RewardModelConfig,
    }.get(kind, ClassConfig)
    config = _parse(
        config_type, _gather(_gather(argv, "--config"), "--option"), prog=f"penstock env serve {name}"
    )
    target, options = config.target_and_options(name if config_type is ClassConfig else rest)
    log.configure(config.server.log_level)
    uvloop.run(_run_server(target, options, config.server))
    return 0


async def _run_server(target: str, options: Mapping[str, object], config: ServerConfig) -> None:
    stop = Stop()
    stop.on_signals()
    host = config.bind.rpartition(":")[0]

    def announce(description: Description, port: int) -> None:
        print(f"serving {description.name} on {host}:{port}", flush=True)  # noqa: T201  scripts wait for this line

    collect_rarely()
    allow_most_files()
    await serve(spec_of(target, options, config), config, stop, announce)


def _check(address: str, argv: Sequence[str]) -> int:
    config = _parse(CheckConfig, argv, prog=f"penstock env check {address}")
    log.configure("WARNING")
    settings = conformance.Settings(
        split=config.split, action=config.action, timeout_seconds=config.timeout_seconds
    )
    patience = f"at most {settings.timeout_seconds:g} s for each call"
    print(f"waiting for {address} to play {len(conformance.RULES)} rules, {patience}", file=sys.stderr)  # noqa: T201
    findings = asyncio.run(conformance.check(address, settings))
    print(conformance.table(findings))  # noqa: T201  the command line's own output
    return 0 if all(finding.passed for finding in findings) else 1


def _parse(config_type: Callable[..., Any], argv: Sequence[str], *, prog: str) -> Any:
    return tyro.cli(
        config_type,
        args=with_switches(ServerConfig, argv),
        prog=prog,
        config=(tyro.conf.FlagConversionOff,),
    )


def _gather(argv: Sequence[str], flag: str) -> list[str]:
    """Puts `--config.KEY VALUE`, and each KEY=VALUE after one or more `--config`, behind a single flag."""
    gathered: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    open_flag = False
    for argument in arguments:
        if argument == flag:
            open_flag = True
        elif argument.startswith(f"{flag}."):
            key, separator, value = argument.removeprefix(f"{flag}.").partition("=")
            gathered.append(f"{key}={value if separator else next(arguments, '')}")
            open_flag = False
        elif open_flag and not argument.startswith("--"):
            gathered.append(argument)
        else:
            open_flag = False
            rest.append(argument)
    return [*rest, flag, *gathered] if gathered else rest


def _key_values(flag: str, pairs: Sequence[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"{flag} got {pair!r}; expected KEY=VALUE")
        values[key] = _json_or_text(value)
    return values


def _json_or_text(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:
        return value
