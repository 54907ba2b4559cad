"""Settings of evaluations during a run."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.errors import ConfigError
from penstock.scores import check_pass_at
from penstock.trajectory import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Every so many versions the fleet answers held-out prompts under one of them, while training goes on."""

    every_steps: int = 0
    """Versions from one that is evaluated to the next, the run's first and last included. 0: none is."""
    environments: tuple[str, ...] = ()
    """HOST:PORT of each server whose evaluation tasks are played; by default the run's `environments`."""
    num_prompts: int = 64
    """Of each environment: its first evaluation tasks, the same each time; fewer if it has fewer."""
    samples_per_prompt: int = 1
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 0
    """Sampled tokens that an episode may hold; 0 takes sampling.max_tokens."""
    pass_at: tuple[int, ...] = (1,)
    """Each k that pass@k is reported for."""
    pass_threshold: float = 1.0
    """An answer passes with at least this reward."""
    fleet_share: float = 0.5
    """At most this share of the actors, and of their slots, works for an evaluation at a time; one actor at least."""
    deadline_seconds: float = 900.0
    """An evaluation that is older ends with the answers that there are, and says how many are missing."""
    seed: int = 1
    """Of tasks and sampling: the same for every version, so that versions compare."""

    def __post_init__(self) -> None:
        self.sampling(1)
        for name, least in (
            ("every_steps", 0),
            ("num_prompts", 1),
            ("samples_per_prompt", 1),
            ("max_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"evaluation.{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 < self.fleet_share <= 1:
            raise ConfigError(f"evaluation.fleet_share is {self.fleet_share}; expected more than 0, up to 1")
        if self.deadline_seconds <= 0:
            raise ConfigError(f"evaluation.deadline_seconds is {self.deadline_seconds}; expected more than 0")
        check_pass_at(self.pass_at, self.samples_per_prompt, "evaluation.pass_at")

    def sampling(self, max_tokens: int) -> Sampling:
        """max_tokens: the run's. Raises ConfigError."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens or max_tokens,
        )
