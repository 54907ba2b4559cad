"""The flags of `penstock chaos`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.errors import ConfigError
from penstock.quickstart.settings import QuickstartConfig

_LEAST_STEPS = 120
_WARM_STARTS_STEPS = 4.0
"""Of the warm start, in the time of one step of a run that is killed every 15 s."""


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
    """Training steps; by default as many as should keep the run going for as long as it is killed, by the time
    that the warm start took."""
    warm_start_steps: int = 450
    """Steps of supervised learning before."""

    def __post_init__(self) -> None:
        for name in ("minutes", "every_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise ConfigError(f"json is {self.json}; expected a file in a folder that exists")
        self.quickstart()

    def quickstart(self) -> QuickstartConfig:
        """The run that is killed. Raises ConfigError."""
        return QuickstartConfig(
            seed=self.seed,
            plain=True,
            actors=self.actors,
            steps=_LEAST_STEPS if self.steps is None else self.steps,
            warm_start_steps=self.warm_start_steps,
        )

    def steps_for(self, warm_start_seconds: float) -> int:
        """Training steps, where none are given."""
        per_second = self.warm_start_steps / warm_start_seconds / _WARM_STARTS_STEPS
        return max(_LEAST_STEPS, round(60 * self.minutes * per_second))
