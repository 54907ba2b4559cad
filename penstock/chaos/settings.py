"""The flags of `penstock chaos`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.errors import ConfigError
from penstock.quickstart.settings import QuickstartConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosConfig:
    minutes: float = 2.0
    """Kill for this long; then the run is left to end by itself."""
    every_seconds: float = 15.0
    """Between two kills."""
    seed: int = 0
    """Of the run, and of who is killed when."""
    run_dir: Path | None = None
    """Where everything is written; by default the next free runs/chaos-N."""
    json: Path | None = None
    """Write the results to this file."""
    actors: int = 2
    steps: int | None = None
    """Training steps; by default as many as keep the run going for about as long as it is killed."""
    warm_start_steps: int = 450
    """Steps of supervised learning before."""

    def __post_init__(self) -> None:
        for name in ("minutes", "every_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0")
        self.quickstart()

    def quickstart(self) -> QuickstartConfig:
        """The run that is killed. Raises ConfigError."""
        return QuickstartConfig(
            seed=self.seed,
            plain=True,
            actors=self.actors,
            steps=max(120, round(60 * self.minutes)) if self.steps is None else self.steps,
            warm_start_steps=self.warm_start_steps,
        )
