"""Settings of `penstock eval`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from actors.engines.names import EngineChoice
from penstock.errors import ConfigError
from penstock.scores import check_pass_at
from penstock.trajectory import Sampling

DEFAULT_ENVIRONMENT = "127.0.0.1:7081"
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    policy: tuple[Path, ...] = ()
    """Hugging Face folders, one row each in every environment."""
    run: Path | None = None
    """A run's folder: each checkpoint that it keeps is evaluated, oldest first."""
    environment: tuple[str, ...] = ()
    """HOST:PORT of environment servers; by default the run's, else 127.0.0.1:7081."""
    split: str = "eval"
    num_tasks: int = 256
    """Of each environment: the split's first tasks; fewer if it holds fewer."""
    samples: int = 1
    """Answers to each task."""
    pass_at: tuple[int, ...] = ()
    """Each k that pass@k is reported for, at most `samples`; by default 1 and `samples`."""
    pass_threshold: float = 1.0
    """An answer passes with at least this reward."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 0
    """Sampled tokens that an episode may hold; 0 takes the run's, else 256."""
    truncation_reward: float = 0.0
    """Reward of an episode that is cut at `max_tokens` before its environment was done."""
    num_slots: int = 64
    """Sequences decoded at once."""
    engine: EngineChoice = "torch"
    """vllm, torch, or auto: vllm if it is installed and the device is a GPU."""
    device: str = "auto"
    seed: int = 1
    """Of tasks and sampling."""
    json: Path | None = None
    """Also write the result to this file."""
    out: Path | None = None
    """Also write every answer to this file, a JSON object a line, as they come."""

    def __post_init__(self) -> None:
        for name in ("num_tasks", "samples", "num_slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_tokens < 0:
            raise ConfigError(f"max_tokens is {self.max_tokens}; expected 0 (the default) or more")
        if bool(self.policy) == (self.run is not None):
            got = "both" if self.policy else "neither"
            raise ConfigError(f"got {got} of --policy FOLDER ... and --run RUN_DIR; expected one of them")
        self.sampling(0)
        check_pass_at(self.pass_at, self.samples, "pass_at")

    @property
    def passes(self) -> tuple[int, ...]:
        return self.pass_at or tuple(dict.fromkeys((1, self.samples)))

    def sampling(self, seed: int) -> Sampling:
        """Raises ConfigError."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS,
            seed=seed,
        )

    def resolved(self) -> EvalConfig:
        """With what a run's own configuration says where the command line says nothing. Raises ConfigError."""
        environment: tuple[str, ...] = (DEFAULT_ENVIRONMENT,)
        max_tokens = DEFAULT_MAX_TOKENS
        if self.run is not None:
            environment, max_tokens = _of_run(self.run / "config.toml")
        return replace(
            self,
            environment=self.environment or environment,
            max_tokens=self.max_tokens or max_tokens,
        )


def _of_run(path: Path) -> tuple[tuple[str, ...], int]:
    """Environments to evaluate on, and the tokens of an episode."""
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a run's configuration: {error}") from error
    evaluation, sampling = settings.get("evaluation", {}), settings.get("sampling", {})
    environments = evaluation.get("environments") or settings.get("environments", ())
    max_tokens = evaluation.get("max_tokens") or sampling.get("max_tokens", DEFAULT_MAX_TOKENS)
    return tuple(environments), max_tokens
