"""What an algorithm is made of, by name, and the presets named for their papers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Preset(StrEnum):
    GRPO = "grpo"
    DAPO = "dapo"
    DR_GRPO = "dr_grpo"
    GSPO = "gspo"
    CISPO = "cispo"
    RLOO = "rloo"
    REINFORCE_PLUS_PLUS = "reinforce_plus_plus"
    DECOUPLED_PPO = "decoupled_ppo"
    DPPO_TV = "dppo_tv"
    PPO = "ppo"
    ONLINE_DPO = "online_dpo"
    """Pairs from groups: preference_recipe.py has its settings."""


class Advantage(StrEnum):
    GROUP_MEAN = "group_mean"
    GROUP_STD = "group_std"
    LEAVE_ONE_OUT = "leave_one_out"
    BATCH_STD = "batch_std"
    GROUP_MEAN_BATCH_STD = "group_mean_batch_std"
    GAE = "gae"
    """Per token, from a critic that is trained beside the policy."""


class Level(StrEnum):
    """Of the importance ratio."""

    TOKEN = "token"  # noqa: S105
    SEQUENCE = "sequence"
    """exp of the mean log-ratio of a sequence, for all of its tokens."""


class Proximal(StrEnum):
    """What the ratio divides by."""

    BEHAVIOUR = "behaviour"
    """The policy that sampled, as recorded: the papers' pi_old. The clip binds as lag grows."""
    START = "start"
    """The policy at the start of the step, scored anew; what sampled is left to the correction."""
    INTERPOLATED = "interpolated"
    """Between the policy that sampled and the learner's, by each token's lag, without scoring."""


class Clip(StrEnum):
    NONE = "none"
    PPO = "ppo"
    CISPO = "cispo"


class Correction(StrEnum):
    """For what another policy sampled: c is the ratio of proximal (or learner) to behaviour policy."""

    NONE = "none"
    TRUNCATE = "truncate"
    """min(c, high) a token."""
    TRUNCATE_SEQUENCE = "truncate_sequence"
    MASK = "mask"
    """c within [low, high], else 0, a token (IcePop)."""
    MASK_SEQUENCE = "mask_sequence"
    GEOMETRIC = "geometric"
    """Leaves out sequences whose mean ratio is outside (low, high)."""
    SECOND_MOMENT = "second_moment"
    """Leaves out the worst tokens until the mean of (log c)^2 is at most the threshold (M2PO)."""
    TOTAL_VARIATION = "total_variation"
    """Leaves out tokens that moved by more than the threshold in their advantage's direction (DPPO-TV)."""


class Aggregation(StrEnum):
    TOKEN_MEAN = "token_mean"  # noqa: S105
    SEQUENCE_MEAN = "sequence_mean"
    SEQUENCE_SUM = "sequence_sum"
    CONSTANT_LENGTH = "constant_length"


class Divergence(StrEnum):
    """From the run's first policy."""

    NONE = "none"
    K1 = "k1"
    """Taken off the reward; as a loss its expected gradient is 0."""
    K2 = "k2"
    K3 = "k3"


WEIGHTS = (
    Correction.TRUNCATE,
    Correction.TRUNCATE_SEQUENCE,
    Correction.MASK,
    Correction.MASK_SEQUENCE,
)
"""Corrections that multiply by the ratio itself."""
BOUNDED_BELOW = (Correction.MASK, Correction.MASK_SEQUENCE, Correction.GEOMETRIC)
BOUNDED_ABOVE = (*WEIGHTS, Correction.GEOMETRIC)
BY_THRESHOLD = (Correction.SECOND_MOMENT, Correction.TOTAL_VARIATION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A policy gradient. A field that the composition doesn't use holds its default, and means nothing."""

    advantage: Advantage = Advantage.GROUP_STD
    ratio: Level = Level.TOKEN
    proximal: Proximal = Proximal.BEHAVIOUR
    clip: Clip = Clip.PPO
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    correction: Correction = Correction.NONE
    correction_low: float = 0.5
    correction_high: float = 2.0
    correction_threshold: float = 0.0
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    aggregation_tokens: int = 0
    kl: Divergence = Divergence.NONE
    kl_coefficient: float = 0.0
    overlong_share: float = 0.0
    overlong_penalty: float = 0.0
    dynamic_sampling: bool = False
    max_refills: int = 10
    gae_gamma: float = 1.0
    gae_lambda: float = 0.95
    critic_learning_rate: float = 1e-5
    updates_per_step: int = 1

    @property
    def ratio_moves(self) -> bool:
        """Whether the ratio can differ from 1, so that a clip has something to hold."""
        return self.proximal is not Proximal.START or self.updates_per_step > 1

    @property
    def has_critic(self) -> bool:
        return self.advantage is Advantage.GAE

    @property
    def has_reference(self) -> bool:
        return self.kl is not Divergence.NONE


PRESETS: dict[Preset, Recipe] = {
    Preset.GRPO: Recipe(aggregation=Aggregation.SEQUENCE_MEAN),
    Preset.DAPO: Recipe(clip_high=0.28, overlong_share=0.2, overlong_penalty=1.0, dynamic_sampling=True),
    Preset.DR_GRPO: Recipe(advantage=Advantage.GROUP_MEAN, aggregation=Aggregation.CONSTANT_LENGTH),
    Preset.GSPO: Recipe(
        ratio=Level.SEQUENCE, clip_low=3e-4, clip_high=4e-4, aggregation=Aggregation.SEQUENCE_MEAN
    ),
    Preset.CISPO: Recipe(clip=Clip.CISPO, clip_high=4.0),
    Preset.RLOO: Recipe(
        advantage=Advantage.LEAVE_ONE_OUT,
        proximal=Proximal.START,
        clip=Clip.NONE,
        correction=Correction.TRUNCATE,
        aggregation=Aggregation.SEQUENCE_SUM,
    ),
    Preset.REINFORCE_PLUS_PLUS: Recipe(advantage=Advantage.BATCH_STD),
    Preset.DECOUPLED_PPO: Recipe(
        proximal=Proximal.START, correction=Correction.TRUNCATE, correction_high=5.0
    ),
    Preset.DPPO_TV: Recipe(clip=Clip.NONE, correction=Correction.TOTAL_VARIATION, correction_threshold=0.2),
    Preset.PPO: Recipe(advantage=Advantage.GAE),
}
