"""What every evaluation of a run asks, and under which settings. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.questions import Question, ask
from penstock.trajectory import Sampling

EVAL = "eval"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSource:
    """One environment's evaluation split."""

    environment: str
    num_prompts: int


class Plan:
    """The slots of an evaluation: the same for every version."""

    def __init__(
        self, sources: Sequence[EvaluationSource], *, samples: int, seed: int, sampling: Sampling
    ) -> None:
        self._sizes = {source.environment: source.num_prompts for source in sources}
        self._sampling = sampling
        self._settings = {"samples": samples, "seed": seed}
        self.questions = ask(self._sizes, split=EVAL, samples=samples, seed=seed)

    @property
    def environments(self) -> tuple[str, ...]:
        return tuple(self._sizes)

    @property
    def max_tokens(self) -> int:
        return self._sampling.max_tokens

    def sampling(self, question: Question) -> Sampling:
        return dataclasses.replace(self._sampling, seed=question.sampling_seed)

    def describe(self) -> str:
        """JSON by which two plans are told apart."""
        sampling = dataclasses.asdict(self._sampling)
        return json.dumps(
            {"environments": self._sizes, **self._settings, "sampling": sampling}, sort_keys=True
        )
