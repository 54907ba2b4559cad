"""`[algorithm]` of a run: a preset, and what of it is changed.

A setting that the resulting composition does not use is refused, by name, and so is one
that contradicts another: nothing that is written down may be without effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from learner.algorithms.preference_recipe import OnlineRecipe, PreferenceLoss
from learner.algorithms.recipe import (
    BOUNDED_ABOVE,
    BOUNDED_BELOW,
    BY_THRESHOLD,
    PRESETS,
    WEIGHTS,
    Advantage,
    Aggregation,
    Clip,
    Correction,
    Divergence,
    Level,
    Preset,
    Proximal,
    Recipe,
)
from learner.training.preference_config import preference_recipe
from penstock.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """What is unset is as the preset has it; docs/algorithms.md lists them."""

    preset: Preset = Preset.DECOUPLED_PPO
    updates_per_step: int | None = None
    """Optimiser updates that a step's batch is split into."""
    advantage: Advantage | None = None
    ratio: Level | None = None
    proximal: Proximal | None = None
    clip: Clip | None = None
    clip_low: float | None = None
    """The ratio is held above 1 - clip_low."""
    clip_high: float | None = None
    """The ratio is held below 1 + clip_high."""
    dual_clip: float | None = None
    """Bounds the loss of a negative advantage at this many times its size; more than 1."""
    correction: Correction | None = None
    correction_low: float | None = None
    correction_high: float | None = None
    correction_threshold: float | None = None
    aggregation: Aggregation | None = None
    aggregation_tokens: int | None = None
    """The constant of constant_length; unset, it is sampling.max_tokens."""
    kl: Divergence | None = None
    """Keeps the policy near the one that the run started from."""
    kl_coefficient: float | None = None
    overlong_share: float | None = None
    """The last share of sampling.max_tokens in which an answer's reward falls."""
    overlong_penalty: float | None = None
    """By how much it has fallen at sampling.max_tokens."""
    dynamic_sampling: bool | None = None
    """Groups with equal rewards are dropped and others generated in their place."""
    max_refills: int | None = None
    """Steps' worth of groups that may be dropped for one step; after that, groups are trained as they are."""

    gae_gamma: float | None = None
    """Discount of later rewards, a token."""
    gae_lambda: float | None = None
    """1 takes whole returns for targets, 0 the critic's next estimate."""
    critic_learning_rate: float | None = None
    loss: PreferenceLoss | None = None
    """online_dpo: the loss of a pair."""
    beta: float | None = None
    """online_dpo: how far the policy may leave the one that the run started from."""
    label_smoothing: float | None = None
    """online_dpo with cdpo or robust: the share of pairs with the wrong answer chosen."""
    margin: float | None = None
    """online_dpo with simpo: by how much the chosen answer is to be better."""

    def __post_init__(self) -> None:
        self.recipe()

    def recipe(self) -> Recipe | OnlineRecipe:
        """The preset with the overrides. Raises ConfigError."""
        overrides: dict[str, Any] = {name: value for name, value in _set_fields(self) if name != "preset"}
        allowed = _ONLINE if self.preset is Preset.ONLINE_DPO else _POLICY_GRADIENT
        for name in overrides:
            if name not in allowed:
                raise ConfigError(f"algorithm.{name} has no effect on preset {self.preset}; leave it out")
        return self._online() if self.preset is Preset.ONLINE_DPO else self._policy_gradient(overrides)

    def _online(self) -> OnlineRecipe:
        preference = preference_recipe(
            self.loss or PreferenceLoss.SIGMOID,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            prefix="algorithm.",
        )
        dynamic_sampling = self.dynamic_sampling is not False
        if self.max_refills is not None and not dynamic_sampling:
            raise ConfigError("algorithm.max_refills has no effect: dynamic_sampling is off; leave it out")
        recipe = OnlineRecipe(
            preference=preference,
            updates_per_step=1 if self.updates_per_step is None else self.updates_per_step,
            dynamic_sampling=dynamic_sampling,
            max_refills=10 if self.max_refills is None else self.max_refills,
        )
        _check_least(recipe, ("updates_per_step", "max_refills"))
        return recipe

    def _policy_gradient(self, overrides: dict[str, Any]) -> Recipe:
        recipe = dataclasses.replace(PRESETS[self.preset], **overrides)
        for name, reason in _unused(recipe):
            if name in overrides:
                raise ConfigError(
                    f"algorithm.{name} has no effect on preset {self.preset}: {reason}; leave it out"
                )
        _check(recipe)
        return recipe


def _set_fields(config: object) -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if value is not None:
            yield field.name, value


def _unused(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Settings that this composition ignores, each with the reason."""
    if recipe.clip is Clip.NONE:
        yield from _all(("clip_low", "clip_high", "dual_clip"), "clip is none")
    elif not recipe.ratio_moves:
        reason = "with one update a step and proximal start the ratio is always 1"
        yield from _all(("clip", "clip_low", "clip_high", "dual_clip"), reason)
    elif recipe.clip is Clip.CISPO:
        yield from _all(("clip_low", "dual_clip"), "cispo bounds the ratio from above only")
    correction = f"correction is {recipe.correction}"
    if recipe.correction not in BOUNDED_BELOW:
        yield "correction_low", correction
    if recipe.correction not in BOUNDED_ABOVE:
        yield "correction_high", correction
    if recipe.correction not in BY_THRESHOLD:
        yield "correction_threshold", correction
    if recipe.aggregation is not Aggregation.CONSTANT_LENGTH:
        yield "aggregation_tokens", f"aggregation is {recipe.aggregation}"
    if recipe.kl is Divergence.NONE:
        yield "kl_coefficient", "kl is none"
    if not recipe.overlong_share:
        yield "overlong_penalty", "overlong_share is 0"
    if not recipe.dynamic_sampling:
        yield "max_refills", "dynamic_sampling is off"
    if not recipe.has_critic:
        reason = f"advantage is {recipe.advantage}"
        yield from _all(("gae_gamma", "gae_lambda", "critic_learning_rate"), reason)


def _all(names: tuple[str, ...], reason: str) -> Iterator[tuple[str, str]]:
    for name in names:
        yield name, reason


_RANGES: dict[str, tuple[float, float]] = {
    "clip_low": (0.0, 1.0),
    "correction_low": (0.0, 1.0),
    "overlong_share": (0.0, 1.0),
    "gae_gamma": (0.0, 1.0),
    "gae_lambda": (0.0, 1.0),
}
_AT_LEAST: dict[str, float] = {
    "updates_per_step": 1,
    "max_refills": 1,
    "clip_high": 0.0,
    "dual_clip": 0.0,
    "correction_high": 1.0,
    "correction_threshold": 0.0,
    "aggregation_tokens": 0,
    "kl_coefficient": 0.0,
    "overlong_penalty": 0.0,
    "critic_learning_rate": 0.0,
}


_ONLINE = frozenset(
    ("updates_per_step", "dynamic_sampling", "max_refills", "loss", "beta", "label_smoothing", "margin")
)
_POLICY_GRADIENT = frozenset(field.name for field in dataclasses.fields(Recipe))


def _check_least(recipe: Recipe | OnlineRecipe, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(recipe, name) < _AT_LEAST[name]:
            raise ConfigError(
                f"algorithm.{name} is {getattr(recipe, name)}; expected at least {_AT_LEAST[name]}"
            )


def _check(recipe: Recipe) -> None:
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(recipe, name) <= high:
            raise ConfigError(f"algorithm.{name} is {getattr(recipe, name)}; expected {low} to {high}")
    _check_least(recipe, tuple(_AT_LEAST))
    if recipe.correction in WEIGHTS and recipe.proximal is Proximal.BEHAVIOUR:
        raise ConfigError(
            f"algorithm.correction is {recipe.correction}, but proximal is behaviour: the ratio to the policy that "
            "sampled would count twice; set proximal to start or interpolated, or take a correction that filters"
        )
    if recipe.correction in BY_THRESHOLD and not recipe.correction_threshold:
        usual = 0.04 if recipe.correction is Correction.SECOND_MOMENT else 0.2
        raise ConfigError(
            f"algorithm.correction is {recipe.correction}; it needs a correction_threshold, usually {usual}"
        )
    if recipe.has_reference and not recipe.kl_coefficient:
        raise ConfigError(f"algorithm.kl is {recipe.kl}; it needs a kl_coefficient above 0")
    if 0 < recipe.dual_clip <= 1:
        raise ConfigError(f"algorithm.dual_clip is {recipe.dual_clip}; expected more than 1, usually 3")
    if recipe.overlong_share and not recipe.overlong_penalty:
        raise ConfigError(
            f"algorithm.overlong_share is {recipe.overlong_share}; it needs an overlong_penalty above 0"
        )
