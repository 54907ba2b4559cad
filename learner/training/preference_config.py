"""A preference loss and its numbers, as configurations name them: what a loss ignores is refused."""

from __future__ import annotations

from learner.algorithms.preference_recipe import SMOOTHED, PreferenceLoss, PreferenceRecipe
from penstock.errors import ConfigError


def preference_recipe(
    loss: PreferenceLoss,
    *,
    beta: float | None,
    label_smoothing: float | None,
    margin: float | None,
    prefix: str = "",
) -> PreferenceRecipe:
    """Unset numbers are the loss's usual ones. Raises ConfigError, naming settings after `prefix`."""
    if label_smoothing is not None and loss not in SMOOTHED:
        raise ConfigError(f"{prefix}label_smoothing has no effect on loss {loss}: leave it out")
    if margin is not None and loss is not PreferenceLoss.SIMPO:
        raise ConfigError(f"{prefix}margin has no effect on loss {loss}: only simpo has one; leave it out")
    recipe = PreferenceRecipe(
        loss=loss,
        beta=(2.0 if loss is PreferenceLoss.SIMPO else 0.1) if beta is None else beta,
        label_smoothing=label_smoothing or 0.0,
        margin=0.5 if margin is None and loss is PreferenceLoss.SIMPO else margin or 0.0,
    )
    if recipe.beta <= 0:
        raise ConfigError(f"{prefix}beta is {recipe.beta}; expected more than 0")
    if loss in SMOOTHED and not 0 < recipe.label_smoothing < 0.5:
        raise ConfigError(
            f"{prefix}label_smoothing is {recipe.label_smoothing}; loss {loss} needs more than 0 and less than 0.5"
        )
    return recipe
