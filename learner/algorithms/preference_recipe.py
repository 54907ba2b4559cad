"""Which preference loss, with which numbers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class PreferenceLoss(StrEnum):
    SIGMOID = "sigmoid"
    CDPO = "cdpo"
    ROBUST = "robust"
    HINGE = "hinge"
    IPO = "ipo"
    SIMPO = "simpo"
    ORPO = "orpo"
    KTO = "kto"


WITHOUT_REFERENCE = (PreferenceLoss.SIMPO, PreferenceLoss.ORPO)
BY_TOKEN = (PreferenceLoss.IPO, PreferenceLoss.SIMPO, PreferenceLoss.ORPO)
"""Compare means over an answer's tokens; the others sums."""
SMOOTHED = (PreferenceLoss.CDPO, PreferenceLoss.ROBUST)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceRecipe:
    """A field that the loss doesn't use means nothing."""

    loss: PreferenceLoss = PreferenceLoss.SIGMOID
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0

    @property
    def has_reference(self) -> bool:
        return self.loss not in WITHOUT_REFERENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRecipe:
    """Preference optimisation on pairs from groups."""

    preference: PreferenceRecipe
    updates_per_step: int = 1
    dynamic_sampling: bool = True
    max_refills: int = 10

    @property
    def has_reference(self) -> bool:
        return self.preference.has_reference
