"""Settings of the trainer: model, optimiser, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from penstock.errors import ConfigError

ALL_LINEAR = "all-linear"


class Device(StrEnum):
    AUTO = "auto"
    """cuda if there is one, else cpu."""
    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    """Compute in bfloat16; master weights and reductions stay in float32."""


class Schedule(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    warmup_steps: int = 0
    schedule: Schedule = Schedule.CONSTANT
    """What follows the warm-up; linear and cosine end at 0 with the run's last step."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"optimizer.learning_rate is {self.learning_rate}; expected more than 0")
        if self.max_grad_norm <= 0:
            raise ConfigError(f"optimizer.max_grad_norm is {self.max_grad_norm}; expected more than 0")
        if self.warmup_steps < 0:
            raise ConfigError(f"optimizer.warmup_steps is {self.warmup_steps}; expected 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; expected 0 <= {name} < 1")


EVALUATION = "evaluation/"
"""How the names of metrics begin that evaluations give."""


class Mode(StrEnum):
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 50
    keep: int = 3
    """The newest so many stay, to resume from. Older checkpoints are deleted."""
    keep_best: int = 0
    """Beside them, so many of all by `metric`, to export; trajectories are not kept for them."""
    metric: str = "reward_mean"
    """A metric of the steps, as in metrics.jsonl: its mean since the checkpoint before. Or one of evaluations:
    evaluation/reward_mean, evaluation/pass@K, the means over environments; evaluation/NAME/reward_mean of one."""
    mode: Mode = Mode.MAX
    """Whether the largest or the smallest is best."""
    in_background: bool = False
    """Train on while a checkpoint is written, from a copy in host memory; the next one waits for it."""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep < 1:
            raise ConfigError(
                f"checkpoint.every_steps is {self.every_steps} and keep {self.keep}; expected at least 1 each"
            )
        if self.keep_best < 0:
            raise ConfigError(f"checkpoint.keep_best is {self.keep_best}; expected 0 (none) or more")
        if not self.metric:
            raise ConfigError("checkpoint.metric is empty; expected a metric's name, such as reward_mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) instead of all weights. They have no dropout: it would make the
    trainer's log-probabilities differ from the engine's."""

    rank: int = 0
    """0 trains all weights."""
    alpha: float | None = None
    """The adapters' product is multiplied by alpha / rank; unset, alpha is twice the rank."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """The linear layers that get one, by their names or the ends of them, such as q_proj. all-linear is all
    but the one that gives the logits."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank is {self.rank}; expected 1 or more, or 0 to train all weights")
        if self.rank == 0 and (self.alpha is not None or self.target_modules != (ALL_LINEAR,)):
            raise ConfigError("lora.alpha and lora.target_modules have no effect while lora.rank is 0")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigError(f"lora.alpha is {self.alpha}; expected more than 0")
        if not self.target_modules:
            raise ConfigError(f"lora.target_modules is empty; expected names of layers, or {ALL_LINEAR}")

    @property
    def scale(self) -> float:
        """What the adapters' product is multiplied by."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    num_ranks: int = 1
    """Trainer processes on this host; FSDP2 shards the policy over them."""
    num_replicas: int = 1
    """Whole copies of the policy (HSDP): each is sharded over num_ranks / num_replicas ranks."""
    context_ranks: int = 1
    """Ranks that hold one row's tokens together, so that long rows fit; they share the attention heads."""
    tensor_ranks: int = 1
    """Ranks that share each matrix of the policy, and the tokens in between: for layers that one rank's memory
    is too small for."""
    pipeline_ranks: int = 1
    """Stages, of num_ranks / pipeline_ranks ranks each, that have consecutive blocks of the policy: rows go through
    them one after the other. What is above divides a stage's ranks."""
    device: Device = Device.AUTO
    precision: Precision = Precision.FLOAT32
    row_tokens: int = 4096
    """Token budget of a packed row. A longer trajectory has a row of its own."""
    rows_per_pass: int = 1
    """Rows, at most, that go through the model together. More take more memory and keep a GPU busy: aim at 16,384
    tokens a pass or more."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass, and compute the rest again."""
    compile: bool = False
    """torch.compile each block: minutes at the start, then faster steps on GPUs."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimiser state in host memory, and update them there: slower steps, but
    GPU memory for no more than a block, the embeddings and what a pass needs."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ConfigError(f"training.num_ranks is {self.num_ranks}; expected at least 1")
        self._check_layout()
        if self.compile and self.tensor_ranks > 1:
            raise ConfigError(
                f"training.compile is on and tensor_ranks {self.tensor_ranks}: blocks of shared matrices would be "
                "compiled again for most rows; set one of them back"
            )
        if self.cpu_offload and self.device is Device.CPU:
            raise ConfigError(
                "training.cpu_offload has no meaning on training.device cpu, where all is in host memory; "
                "set one of them back"
            )
        if self.row_tokens < 16:
            raise ConfigError(f"training.row_tokens is {self.row_tokens}; expected at least 16")
        if self.rows_per_pass < 1:
            raise ConfigError(f"training.rows_per_pass is {self.rows_per_pass}; expected at least 1")

    def _check_layout(self) -> None:
        for name in ("num_replicas", "context_ranks", "tensor_ranks", "pipeline_ranks"):
            value = getattr(self, name)
            if value < 1 or self.num_ranks % value:
                raise ConfigError(
                    f"training.{name} is {value}; expected a divisor of num_ranks, which is {self.num_ranks}"
                )
        for name in ("num_replicas", "context_ranks"):
            value = getattr(self, name)
            if self.num_ranks % (value * self.tensor_ranks * self.pipeline_ranks):
                others = f"tensor_ranks {self.tensor_ranks}"
                if self.pipeline_ranks > 1:
                    others += f" and pipeline_ranks {self.pipeline_ranks}"
                raise ConfigError(
                    f"training.{name} is {value} and {others}; expected a product that divides num_ranks, which is "
                    f"{self.num_ranks}"
                )
        if self.pipeline_ranks > 1 and (self.tensor_ranks > 1 or self.lora.rank):
            raise ConfigError(
                f"training.pipeline_ranks is {self.pipeline_ranks}, tensor_ranks {self.tensor_ranks} and lora.rank "
                f"{self.lora.rank}: stages divide neither matrices nor adapters; set one of them back"
            )
