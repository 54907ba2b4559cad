"""From sequences and an objective to one optimiser update, over rows and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from learner.algorithms.sums import Sums, add_sums
from learner.training.optimizer import clip_gradients, step_if
from learner.training.packing import PackedRow, TokenSequence, join_rows, pack, plan_rows, siblings
from learner.training.parallel import Ranks, accumulate, local, reshard
from learner.training.pipeline import score_rows, train_rows
from learner.training.policy import Policy, TokenScores
from learner.training.transfer import HostCopy, to_device

_PARTS_OF_A_ROW = 4
"""Into so many at least a row divides, where siblings share it."""

Objective = Callable[[PackedRow, TokenScores], tuple[torch.Tensor, Sums]]
"""A row's share of the update's loss, and its sums. Rows of a rank are added, ranks too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    loss: float
    grad_norm: float
    """Before clipping."""
    sums: Mapping[str, float]
    """Over all rows of all ranks."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Updater:
    """Owns the optimiser. Every rank calls the same methods with the same sequences."""

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        row_tokens: int,
        max_grad_norm: float,
        rows_per_pass: int = 1,
        temperature: float = 1.0,
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.ranks = ranks
        self._row_tokens = row_tokens
        self._rows_per_pass = rows_per_pass
        self._max_grad_norm = max_grad_norm
        self._temperature = temperature
        self._hidden_size: int = policy.causal_lm.config.get_text_config().hidden_size

    def update(
        self, sequences: Sequence[TokenSequence], objective: Objective, *, learning_rate: float
    ) -> UpdateReport:
        """One optimiser update on all sequences. Nothing changes if loss or gradient is not finite."""
        rows = self._rows(sequences)
        names, totals = self._totals(add_sums(self._pass(rows, objective)))
        grad_norm = clip_gradients(self.policy, max_norm=self._max_grad_norm).to(totals)
        measured = HostCopy(torch.cat([totals, grad_norm[None]]))
        is_finite = totals[names.index("loss_sum")].isfinite() & grad_norm.isfinite()
        step_if(self.optimizer, is_finite, learning_rate=learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        *values, norm = measured.read()
        sums = dict(zip(names, values, strict=True))
        return UpdateReport(loss=sums.pop("loss_sum"), grad_norm=norm, sums=sums)

    def score(self, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float32]]:
        """Log-probabilities of each sequence's sampled tokens under the policy as it is: [S] float32 each."""
        ends = np.cumsum([sequence.num_sampled for sequence in sequences])
        starts = ends - [sequence.num_sampled for sequence in sequences]
        scores = torch.zeros(int(ends[-1]), dtype=torch.float32, device=self.ranks.device)
        with torch.no_grad():
            for row, found in self._scored(self._rows(sequences)):
                where = [np.arange(starts[member], ends[member]) for member in row.members]
                if where:
                    scores[to_device(np.concatenate(where), row.device)] = found.logprobs_S
        reshard(self.policy)
        flat = self.ranks.sum_of_shares(scores).cpu().numpy()
        return [flat[start:end] for start, end in zip(starts, ends, strict=True)]

    def _rows(self, sequences: Sequence[TokenSequence]) -> list[PackedRow]:
        lengths, num_shares = [sequence.num_tokens for sequence in sequences], self.ranks.num_shares
        most_tokens = min(self._row_tokens, sum(lengths) // num_shares) // _PARTS_OF_A_ROW
        plan = plan_rows(
            lengths,
            row_tokens=self._row_tokens,
            num_ranks=num_shares,
            hidden_size=self._hidden_size,
            parts=siblings(sequences, most_tokens=most_tokens),
        )
        passes = join_rows(plan[self.ranks.share], rows_per_pass=self._rows_per_pass)
        return [pack(sequences, members, self.ranks.device) for members in passes]

    def _pass(self, rows: Sequence[PackedRow], objective: Objective) -> list[Sums]:
        """Forward and backward passes of all rows; what each measured."""

        def loss_of(row: PackedRow, scores: TokenScores) -> tuple[torch.Tensor, Sums]:
            loss, sums = objective(row, scores)
            # FSDP averages gradients over its ranks; the loss's normaliser is global already.
            return loss * self.ranks.num_averaged, {**sums, "loss_sum": loss}

        accumulates = partial(accumulate, self.policy, self.ranks)
        if self.policy.stage is not None:
            return train_rows(
                self.policy, rows, temperature=self._temperature, loss_of=loss_of, before_backward=accumulates
            )
        parts = []
        for index, row in enumerate(rows):
            accumulates(index + 1 == len(rows))
            loss, sums = loss_of(row, self.policy(row, temperature=self._temperature))
            torch.autograd.backward(loss)
            parts.append(sums)
        return parts

    def _scored(self, rows: Sequence[PackedRow]) -> Iterator[tuple[PackedRow, TokenScores]]:
        """Forward passes alone; on ranks that have the policy's end."""
        if self.policy.stage is not None:
            yield from score_rows(self.policy, rows, temperature=self._temperature)
            return
        for row in rows:
            yield row, self.policy(row, temperature=self._temperature)

    def _totals(self, sums: Sums) -> tuple[list[str], torch.Tensor]:
        """Names and float64 totals over all ranks, on the device."""
        added = sorted(name for name in sums if not name.endswith("_max"))
        largest = sorted(name for name in sums if name.endswith("_max"))
        totals = self.ranks.sum_of_shares(_vector(sums, added))
        if largest:
            totals = torch.cat([totals, self.ranks.maximum(_vector(sums, largest))])
        return added + largest, totals


def _vector(sums: Sums, names: Sequence[str]) -> torch.Tensor:
    return torch.stack([sums[name].double() for name in names])


def _trained(updater: Updater) -> list[torch.nn.Parameter]:
    return [parameter for parameter in updater.policy.parameters() if parameter.requires_grad]


class Snapshot:
    """Weights and optimiser state on the CPU, to go back to when a later part of a step fails."""

    def __init__(self, updater: Updater) -> None:
        self._updater = updater
        self._parameters = [local(p.detach()).cpu().clone() for p in _trained(updater)]
        self._state: dict[Any, dict[str, torch.Tensor]] = {
            parameter: {name: local(value).cpu().clone() for name, value in state.items()}
            for parameter, state in updater.optimizer.state.items()
        }

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, weights in zip(_trained(self._updater), self._parameters, strict=True):
                local(parameter.detach()).copy_(weights)
        state = self._updater.optimizer.state
        for key in list(state):
            for name, value in self._state.get(key, {}).items():
                local(state[key][name]).copy_(value)
            if key not in self._state:
                del state[key]
