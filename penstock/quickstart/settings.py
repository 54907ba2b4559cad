"""The quickstart's flags, and the files of settings that it writes for its programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from actors.engines.names import EngineName, require_engine
from penstock.errors import ConfigError

WARM_START_SEQUENCES = 64
"""Demonstrations of one step."""
MAX_TOKENS = 8
"""Sampled by one answer: five letters and the end token, with room to be wrong."""
ALGORITHM = """\
preset = "decoupled_ppo"
correction_high = 2.0
"""
"""The run's [algorithm], as TOML."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickstartConfig:
    run_dir: Path | None = None
    """Where everything is written; by default the next free runs/quickstart-N."""
    seed: int = 0
    plain: bool = False
    """Print lines instead of the live view."""
    kill_an_actor: bool = False
    """Kill one actor with SIGKILL after a third of the steps, and start another."""
    max_lag: int = 4
    """How many versions old a trajectory may be when it is trained on; 0 is synchronous."""
    actors: int = 2
    engine: EngineName = "torch"
    """What actors generate with: torch, or vllm, which takes about a minute more to start."""
    steps: int = 120
    """Training steps, and so versions."""
    warm_start_steps: int = 450
    """Steps of supervised learning before. With fewer there is less for reinforcement to build on."""

    def __post_init__(self) -> None:
        require_engine(self.engine)
        for name, least in (
            ("actors", 1),
            ("steps", 3),
            ("warm_start_steps", 1),
            ("max_lag", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")


def make_folder(wanted: Path | None) -> Path:
    """Makes the run's folder, which must be new or empty. Raises ConfigError."""
    folder = (wanted or _next_free(Path("runs"))).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = next(folder.iterdir(), None) is None
    except OSError as error:
        raise ConfigError(f"run_dir {folder} cannot be used: {error}") from error
    if not is_empty:
        raise ConfigError(
            f"run_dir {folder} is not empty; give another, or go on with its run: "
            f"penstock learner {folder / 'run.toml'}"
        )
    return folder


def _next_free(parent: Path) -> Path:
    return next(path for number in count(1) if not (path := parent / f"quickstart-{number}").exists())


def warm_start_toml(config: QuickstartConfig, *, policy: Path, data: Path, out: Path) -> str:
    """Read by `penstock train sft`."""
    return f"""\
# The warm start: supervised learning from a careless teacher's demonstrations.
#   penstock train sft warm-start.toml

policy = {_quoted(policy)}
data = {_quoted(data)}
out = {_quoted(out)}
num_steps = {config.warm_start_steps}
batch_sequences = {WARM_START_SEQUENCES}
seed = {config.seed}
device = "cpu"

[optimizer]
learning_rate = 3e-3
warmup_steps = 20
schedule = "linear"
"""


def run_toml(
    config: QuickstartConfig,
    *,
    policy: Path,
    folder: Path,
    environment: str,
    bind: str,
    serve: str,
    pipeline_depth: int | None = None,
    algorithm: str = ALGORITHM,
) -> str:
    """Read by `penstock learner`. `serve` is the command that serves the environment."""
    depth = min(3, config.max_lag + 1) if pipeline_depth is None else pipeline_depth
    return f"""\
# A run: asynchronous GRPO on words spelled backward. Each in a terminal of its own:
#   {serve}
#   penstock learner {folder / "run.toml"}
#   penstock actor --learner {bind} --engine {config.engine}
# The same command for the learner goes on from the newest checkpoint; `penstock learner --help`
# lists every setting.

policy = {_quoted(policy)}
run_dir = {_quoted(folder)}
environments = [{_quoted(environment)}]
bind = {_quoted(bind)}
seed = {config.seed}
# An answer that does not end in time is a wrong one.
truncation_reward = 0.0

[schedule]
num_steps = {config.steps}
groups_per_step = 8
group_size = 16
max_lag = {config.max_lag}
# Fast actors stay this many steps ahead, and lag stays below its bound, until one of them falters.
pipeline_depth = {depth}

[sampling]
max_tokens = {MAX_TOKENS}

# Held-out words, answered by every so many versions while training goes on.
[evaluation]
every_steps = {max(config.steps // 6, 1)}
num_prompts = 128

[algorithm]
{algorithm}
[training]
device = "cpu"

[training.optimizer]
learning_rate = 5e-4
warmup_steps = 5
schedule = "linear"
"""


def _quoted(value: object) -> str:
    """As a TOML string."""
    return json.dumps(str(value), ensure_ascii=False)
