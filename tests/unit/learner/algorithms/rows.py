"""Random rows for losses, as packed tensors and as the padded ones that other libraries take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from learner.algorithms.policy_gradient import RowTerms, policy_gradient_loss
from learner.algorithms.recipe import Recipe
from learner.algorithms.sequences import Sequences
from learner.training.compose import compose_aggregation, compose_parts

MAX_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Case:
    """Several sequences; every field is flat, [S], but the advantages, [N]."""

    lengths: list[int]
    new: torch.Tensor
    old: torch.Tensor
    behaviour: torch.Tensor
    reference: torch.Tensor
    advantages: torch.Tensor

    def padded(self, flat: torch.Tensor) -> torch.Tensor:
        """[S] to [N, L]; padding holds a value that must not matter."""
        return torch.nn.utils.rnn.pad_sequence(
            list(flat.split(self.lengths)), batch_first=True, padding_value=-1.5
        )

    @property
    def mask(self) -> torch.Tensor:
        return (torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]).long()

    @property
    def token_advantages(self) -> torch.Tensor:
        return Sequences.of(self.lengths).spread(self.advantages)


def make_case(seed: int, dtype: torch.dtype, *, spread: float = 0.3, on_policy: bool = False) -> Case:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, MAX_TOKENS + 1, (6,), generator=draw).tolist()
    total = sum(lengths)

    def near(center: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(total, generator=draw, dtype=torch.float64) * spread
        return (center + noise).clamp(max=-1e-3)

    new = -3 * torch.rand(total, generator=draw, dtype=torch.float64) - 0.05
    old = new.clone() if on_policy else near(new)
    fields = {"new": new, "old": old, "behaviour": near(old), "reference": near(new)}
    advantages = torch.randn(len(lengths), generator=draw, dtype=torch.float64)
    return Case(
        lengths=lengths, advantages=advantages.to(dtype), **{k: v.to(dtype) for k, v in fields.items()}
    )


def our_loss(case: Case, recipe: Recipe, *, behaviour_is_proximal: bool = True) -> tuple[float, torch.Tensor]:
    """(loss, gradient by the log-probabilities, [S]) of all sequences in one row.

    With behaviour_is_proximal `case.old` sampled the tokens; without, `case.behaviour` did,
    and `case.old` is the proximal policy.
    """
    new = case.new.clone().requires_grad_()
    loss, _ = policy_gradient_loss(
        row_terms(case, new, recipe, behaviour_is_proximal=behaviour_is_proximal), compose_parts(recipe)
    )
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad


def row_terms(
    case: Case, new: torch.Tensor, recipe: Recipe, *, behaviour_is_proximal: bool = True
) -> RowTerms:
    sequences = Sequences.of(case.lengths)
    weigh = compose_aggregation(recipe, max_tokens=MAX_TOKENS)
    weights = torch.from_numpy(weigh(sequences.lengths_N.numpy())).to(new.dtype)
    return RowTerms(
        logprobs_S=new,
        proximal_S=case.old,
        anchor_S=new.detach() if behaviour_is_proximal else case.old,
        behaviour_S=case.old if behaviour_is_proximal else case.behaviour,
        advantages_S=case.token_advantages,
        weights_S=sequences.spread(weights),
        reference_S=case.reference,
        sequences=sequences,
    )


def assert_equal(
    ours: tuple[float, torch.Tensor], theirs: tuple[float, torch.Tensor], dtype: torch.dtype
) -> None:
    """Relative difference of the loss, and of the gradient as a vector."""
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    scale = max(abs(theirs[0]), float(theirs[1].abs().sum()) * 0.1)
    assert abs(ours[0] - theirs[0]) <= tolerance * scale
    assert float(theirs[1].norm()) > 0
    assert float((ours[1] - theirs[1]).norm()) <= tolerance * float(theirs[1].norm())
