"""Settings of a run, as `penstock learner RUN.toml` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from learner.algorithms.preference_recipe import OnlineRecipe, PreferenceLoss
from learner.algorithms.recipe import Recipe
from learner.coordinator.evaluation.config import EvaluationConfig
from learner.coordinator.evaluation.result import pass_k
from learner.training.algorithm_config import AlgorithmConfig
from learner.training.config import EVALUATION, TrainingConfig
from penstock.errors import ConfigError
from penstock.trajectory import InstallMode, Sampling
from penstock.weights.manifest import WeightsMedium

LateGroup = Literal["repair", "partial", "drop"]
OpenGroups = Literal["drop", "partial", "wait"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """How much is trained on, and how far generation may run ahead."""

    num_steps: int = 100
    """Training steps, and so versions, of the run."""
    groups_per_step: int = 8
    group_size: int = 8
    """Trajectories of one prompt."""
    max_lag: int = 4
    """Bound on the learner's version minus the oldest version in a trajectory, when it is
    trained on. 0 is the synchronous mode."""
    pipeline_depth: int = 0
    """Steps' worth of groups that may be open at once; 0 means max_lag + 1. A depth below
    that keeps fast actors from generating at the bound."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "groups_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}; expected at least 1")
        if self.group_size < 2:
            raise ConfigError(
                f"schedule.group_size is {self.group_size}; a group's baseline needs at least 2"
            )
        if self.max_lag < 0:
            raise ConfigError(f"schedule.max_lag is {self.max_lag}; expected 0 (synchronous) or more")
        if not 0 <= self.pipeline_depth <= self.max_lag + 1:
            raise ConfigError(
                f"schedule.pipeline_depth is {self.pipeline_depth}; expected 0 (automatic) to "
                f"max_lag + 1 = {self.max_lag + 1}"
            )

    @property
    def depth(self) -> int:
        return self.pipeline_depth or self.max_lag + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """When an actor, a lease or a slot is given up."""

    heartbeat_seconds: float = 2.0
    suspect_seconds: float = 6.0
    dead_seconds: float = 10.0
    """A session without a heartbeat for this long is dead; its leases are granted again."""
    progress_timeout_seconds: float = 60.0
    """A lease without a new token or turn for this long is granted again."""
    straggler_factor: float = 4.0
    """A rollout that takes this many times the usual seconds a token is leased a second time,
    to another actor, and the first result wins. Half of it is enough while the learner waits
    for nothing else. 0 turns it off."""
    group_deadline_seconds: float = 600.0
    """A group that is this old and still keeps the learner waiting is late."""
    late_group: LateGroup = "repair"
    """What becomes of a late group. repair: its missing slots are leased again elsewhere, and the
    first results win; partial: it is trained with what it has, if that is two or more, else
    repaired; drop: it is dropped and counted."""
    max_actors: int = 4096
    """Connected at once, and how many may join in one rush; after that 100 a second. Others wait."""
    infrastructure_budget: int = 5
    """Infrastructure faults after which a slot is given up."""
    data_budget: int = 2
    """Data faults after which a slot is given up."""
    stream_tokens: int = 128
    """An actor sends what it played of a rollout each time that has so many more sampled tokens;
    should it die, another goes on from there. 0: never, and long rollouts begin anew."""
    stream_bytes: int = 256 * 1024 * 1024
    """Memory for that, 9 bytes a token. Rollouts that find no room are not kept."""
    credit_trajectories: int = 1024
    credit_bytes: int = 64 * 1024 * 1024
    reset_timeout_seconds: float = 30.0
    step_timeout_seconds: float = 60.0
    install_mode: InstallMode = InstallMode.KEEP
    """What becomes of running sequences when an actor installs a version: keep goes on with their
    key-value cache, recompute reads them again under the new weights, which costs a prefill."""

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_seconds < self.suspect_seconds < self.dead_seconds:
            raise ConfigError(
                f"fleet.heartbeat_seconds {self.heartbeat_seconds}, suspect_seconds {self.suspect_seconds} and "
                f"dead_seconds {self.dead_seconds} must grow, from above 0"
            )
        if self.straggler_factor != 0 and self.straggler_factor < 2:
            raise ConfigError(
                f"fleet.straggler_factor is {self.straggler_factor}; expected 2 or more, or 0 for no rivals: "
                "below 2, rollouts at the usual pace would be raced"
            )
        for name in (
            "progress_timeout_seconds",
            "reset_timeout_seconds",
            "step_timeout_seconds",
            "group_deadline_seconds",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"fleet.{name} is {getattr(self, name)}; expected more than 0")
        if self.stream_tokens < 0:
            raise ConfigError(f"fleet.stream_tokens is {self.stream_tokens}; expected 0 (never) or more")
        for name in (
            "max_actors",
            "stream_bytes",
            "infrastructure_budget",
            "data_budget",
            "credit_trajectories",
            "credit_bytes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"fleet.{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig:
    """What happens as the run folder's disk fills up. Each share is of the disk that is used; 1 is never."""

    warn_at: float = 0.80
    """An event warns."""
    stop_leases_at: float = 0.90
    """No lease is granted; what is leased goes on."""
    end_run_at: float = 0.95
    """The learner ends in order, with status 4."""
    of_at_most_bytes: int = 10 * 1024**3
    """Of a larger disk only so many bytes count: leases stop when a tenth of them is free."""
    ballast_bytes: int = 64 * 1024**2
    """Set aside in a file, and freed so that the ledger can be closed on a full disk."""

    def __post_init__(self) -> None:
        if not 0 < self.warn_at <= self.stop_leases_at <= self.end_run_at <= 1:
            raise ConfigError(
                f"ledger.disk has warn_at {self.warn_at}, stop_leases_at {self.stop_leases_at} and end_run_at "
                f"{self.end_run_at}; expected shares above 0 and up to 1, in this order"
            )
        if self.of_at_most_bytes <= 0 or self.ballast_bytes < 0:
            raise ConfigError(
                f"ledger.disk has of_at_most_bytes {self.of_at_most_bytes} and ballast_bytes "
                f"{self.ballast_bytes}; expected more than 0, and 0 (none) or more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerConfig:
    """When an environment is left out so that the others go on, and when it is tried again."""

    failures: int = 3
    """Failed or overdue rollouts, at the least, and half of all, before it is left out."""
    slow_factor: float = 8.0
    """A call is overdue when it takes this many times what is usual for its environment. 0: never."""
    slow_seconds: float = 5.0
    """A call that has taken less is never overdue."""
    probe_seconds: float = 5.0
    """Until it is tried again; twice as long after each failed try, up to 12 times this."""
    open_groups: OpenGroups = "drop"
    """What becomes of its unfinished groups. drop: they are dropped and counted, and others take their
    place; partial: those with two or more trajectories are trained without what they miss, others are
    dropped; wait: they keep their place, and once they are due the learner waits for them."""

    def __post_init__(self) -> None:
        if self.failures < 1:
            raise ConfigError(f"breaker.failures is {self.failures}; expected at least 1")
        if self.slow_factor != 0 and self.slow_factor < 2:
            raise ConfigError(
                f"breaker.slow_factor is {self.slow_factor}; expected 2 or more, or 0 for no limit: below 2, "
                "calls that take their usual time would be overdue"
            )
        for name in ("slow_seconds", "probe_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"breaker.{name} is {getattr(self, name)}; expected more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerConfig:
    """What the ledger keeps, and when it runs out of room."""

    keep_payloads: bool = False
    """Keep trajectories that every kept checkpoint covers, so that `penstock replay` can
    train on them again. Otherwise they are deleted with the checkpoint that covers them."""
    disk: DiskConfig = field(default_factory=DiskConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """How versions get to actors. Pulling always works; broadcasting is for a group of actors that stay."""

    medium: WeightsMedium = WeightsMedium.AUTO
    """auto: actors with GPUs on other hosts form a group if the learner has a GPU, all others pull;
    collective: every actor that does not ask to pull; pull: none."""
    port: int = 0
    """Where actors on other hosts fetch versions, at the host of `bind`; 0 takes a free one."""
    stable_seconds: float = 10.0
    """For how long an actor must have had a version installed before it is in a group."""
    regroup_seconds: float = 30.0
    """Between two groups, at the least, when actors have joined."""
    timeout_seconds: float = 10.0
    """A piece of a broadcast that takes longer ends the group: its members pull."""
    forming_seconds: float = 60.0
    """A group that takes longer to come together is given up."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"weights.port is {self.port}; expected 0 to 65535")
        for name in ("stable_seconds", "regroup_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"weights.{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("timeout_seconds", "forming_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"weights.{name} is {getattr(self, name)}; expected more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    policy: Path
    """A Hugging Face folder: config.json, tokeniser, safetensors."""
    environments: tuple[str, ...]
    """HOST:PORT of each environment server; prompts are drawn from them in turn."""
    run_dir: Path
    """Ledger, checkpoints, metrics and the resolved configuration. Start again with the
    same folder to resume."""
    seed: int = 0
    bind: str = "127.0.0.1:7070"
    """Where actors and operators connect."""
    metrics_bind: str = ""
    """HOST:PORT of Prometheus metrics over HTTP; empty for none."""
    insecure: bool = False
    """Allow addresses beyond loopback although nothing authenticates who connects."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sampling: Sampling = field(default_factory=Sampling)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    truncation_reward: float | None = None
    """Reward of an episode that is cut at a token limit before its environment is done.
    Unset, such an episode has no reward and counts as a fault of its task."""
    fleet: FleetConfig = field(default_factory=FleetConfig)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if not self.environments:
            raise ConfigError(
                "environments is empty; expected at least one HOST:PORT of an environment server"
            )
        if self.sampling.temperature == 0 or self.sampling.top_p < 1 or self.sampling.top_k > 0:
            raise ConfigError(
                f"sampling has temperature {self.sampling.temperature}, top_p {self.sampling.top_p} and top_k "
                f"{self.sampling.top_k}; training needs a temperature above 0, top_p 1 and top_k 0, since "
                "importance ratios hold only where every token could have been sampled"
            )
        self._check_checkpoint_metric()
        recipe = self.algorithm.recipe()
        if isinstance(recipe, Recipe) and recipe.overlong_share and self.truncation_reward is None:
            raise ConfigError(
                f"algorithm.preset {self.algorithm.preset} lowers the rewards of overlong answers, but "
                "truncation_reward is unset, so that answers cut at sampling.max_tokens are never trained on; "
                "set it, or algorithm.overlong_share = 0"
            )
        is_kto = isinstance(recipe, OnlineRecipe) and recipe.preference.loss is PreferenceLoss.KTO
        if is_kto and self.schedule.groups_per_step == 1:
            raise ConfigError(
                "schedule.groups_per_step is 1, but algorithm.loss is kto, which measures the divergence on answers "
                "to other prompts of the step; expected at least 2"
            )

    def _check_checkpoint_metric(self) -> None:
        metric = self.training.checkpoint.metric
        if not metric.startswith(EVALUATION):
            return
        measure = metric.rpartition("/")[2]
        if measure != "reward_mean" and pass_k(measure) not in self.evaluation.pass_at:
            ks = ", ".join(f"pass@{k}" for k in self.evaluation.pass_at)
            raise ConfigError(
                f"training.checkpoint.metric is {metric}; of evaluations, expected {EVALUATION}[NAME/] and "
                f"reward_mean or one of evaluation.pass_at: {ks}"
            )
        if not self.evaluation.every_steps:
            raise ConfigError(
                f"training.checkpoint.metric is {metric}, but evaluation.every_steps is 0: no version is evaluated; "
                "set it to the same number as training.checkpoint.every_steps, or take a metric of the steps"
            )
