"""The learner policy: a causal LM that scores the sampled tokens of packed rows.

How rows are evaluated is found out, not assumed: at the start `choose_evaluation` runs
two short sequences packed and alone, and takes the fastest way that agrees. A model with
recurrent state, a mask or attention of its own is evaluated in padded batches instead,
where sequences cannot touch each other.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from learner.training.adapters import Adapters
from learner.training.attention import PACKED, AttentionUnsupported, RowLayout
from learner.training.context import ContextGroup
from learner.training.logprobs import score_logits, token_logprobs
from learner.training.packing import PackedRow, nodes_of, padded
from learner.training.prefixes import take
from learner.training.tensor_parallel import TensorGroup
from learner.training.vocabulary import shared_token_logprobs
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from learner.training.pipeline import Stage

_log = logging.getLogger(__name__)

_PROBE_LENGTHS = (6, 3)
_TOLERANCE = 1e-3


class RowForm(StrEnum):
    PACKED = "packed"
    """One row, sequences end to end, variable-length attention."""
    PADDED = "padded"
    """One row a sequence, padded on the right: exact for every causal model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How a model is run."""

    form: RowForm
    split_head: bool
    """Logits are the product of the last hidden state and one matrix, so they can be computed in chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What the policy says of a row's sampled tokens."""

    logprobs_S: torch.Tensor
    """[S] float32, with gradients."""
    entropy_S: torch.Tensor
    """[S] float32, without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the weights of a policy are that has none yet."""

    folder: Path
    seed: int
    """Of the first values of adapters."""


class Policy(nn.Module):
    """Wraps a transformers model; its parameters keep their names below `causal_lm`."""

    def __init__(self, causal_lm: Any, evaluation: Evaluation) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.evaluation = evaluation
        self.adapters: Adapters | None = None
        """What alone is trained, if anything is not."""
        self.context: ContextGroup | None = None
        """Who else holds tokens of each row."""
        self.tensor: TensorGroup | None = None
        """Who else holds parts of each matrix."""
        self.stage: Stage | None = None
        """Which blocks are here, where other ranks have others."""
        self.source: Source | None = None
        """What is still to be read into parameters on the meta device."""

    def forward(self, row: PackedRow, *, temperature: float) -> TokenScores | torch.Tensor:
        """Scores every sampled token of one row under softmax(logits / temperature).

        On a stage that is not the last: the hidden states [1, T, H] that the next one begins with.
        """
        row = self._nodes_of(row)
        if self.stage is not None and not self.stage.group.is_last:
            part = self._part_of(row)
            return self._hidden(part, self._layout(part))[None]
        if self.context is None:
            logprobs_S, entropy_S = self._score(row, temperature)
        else:
            parts = self._score(self.context.slice_of(row), temperature)
            logprobs_S, entropy_S = (self.context.join(part, row) for part in parts)
        return TokenScores(logprobs_S=logprobs_S, entropy_S=entropy_S)

    def num_hidden(self, row: PackedRow) -> int:
        """Of how many tokens this rank has the row's hidden states."""
        return self._part_of(self._nodes_of(row)).token_ids_T.numel()

    def _part_of(self, row: PackedRow) -> PackedRow:
        return row if self.context is None else self.context.slice_of(row)

    @property
    def _num_slices(self) -> int:
        """What the number of a row's tokens must be a multiple of."""
        context = 1 if self.context is None else self.context.size
        return context * (1 if self.tensor is None else self.tensor.size)

    def _nodes_of(self, row: PackedRow) -> PackedRow:
        """What is computed of a row: its nodes, where this rank has it for itself."""
        if self.evaluation.form is RowForm.PACKED and self._num_slices == 1:
            return nodes_of(row)
        return dataclasses.replace(padded(row, self._num_slices), forest=None)

    def _layout(self, row: PackedRow) -> RowLayout:
        return RowLayout(row.lengths, row.device, self.context, row.forest)

    def _score(self, row: PackedRow, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        layout = self._layout(row)
        if self.evaluation.split_head:
            hidden_TH, weight_VH = self._hidden(row, layout), self.causal_lm.get_output_embeddings().weight
            if self.tensor is not None:
                hidden_SH = self.tensor.all_tokens(hidden_TH, summed=True)[row.predictors_S]
                part = self.tensor.part_of(weight_VH)
                return shared_token_logprobs(hidden_SH, part, row.targets_S, temperature=temperature)
            hidden_SH = take(hidden_TH, row.predictors_S)
            return token_logprobs(hidden_SH, weight_VH, row.targets_S, temperature=temperature)
        logits_SV = take(self._logits(row, layout), row.predictors_S)
        return score_logits(logits_SV, row.targets_S, temperature=temperature)

    def _hidden(self, row: PackedRow, layout: RowLayout) -> torch.Tensor:
        """[T, H]: the last hidden state of each token; of this rank's tokens, if others share the matrices."""
        return self._run(self.causal_lm.base_model, row, layout, "last_hidden_state")

    def _logits(self, row: PackedRow, layout: RowLayout) -> torch.Tensor:
        """[T, V]: what the whole model makes of each token."""
        return self._run(self.causal_lm, row, layout, "logits")

    def _run(self, module: nn.Module, row: PackedRow, layout: RowLayout, output: str) -> torch.Tensor:
        if self.evaluation.form is RowForm.PACKED:
            begun = row.hidden_1TH is not None
            outputs = module(
                input_ids=None if begun else row.token_ids_T[None],
                inputs_embeds=row.hidden_1TH,
                position_ids=row.positions_T[None],
                use_cache=False,
                row_layout=layout,
            )
            packed: torch.Tensor = getattr(outputs, output)[0]
            return packed
        padded_NL, inside_NL = _right_padded(row)
        outputs = module(input_ids=padded_NL, use_cache=False)
        padded: torch.Tensor = getattr(outputs, output)[inside_NL]
        return padded


def context_of(policy: Policy) -> int:
    """Tokens that the policy's positions reach."""
    context: int | None = getattr(policy.causal_lm.config, "max_position_embeddings", None)
    return context or sys.maxsize


def _right_padded(row: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
    """([N, L] int64 token ids, [N, L] bool where they are real). No causal model sees what comes later."""
    lengths_N = torch.tensor(row.lengths, device=row.device)
    inside_NL = torch.arange(row.lengths[0], device=row.device) < lengths_N[:, None]
    padded_NL = torch.zeros(inside_NL.shape, dtype=torch.int64, device=row.device)
    padded_NL[inside_NL] = row.token_ids_T
    return padded_NL, inside_NL


def packed_evaluation(causal_lm: Any) -> Evaluation:
    """What choose_evaluation finds for families that are known, of a model without weights."""
    causal_lm.set_attn_implementation(PACKED)
    return Evaluation(form=RowForm.PACKED, split_head=True)


def choose_evaluation(causal_lm: Any) -> Evaluation:
    """Tries packed rows and a split head on two short sequences; falls back to what is exact.

    The model is on one device, in float32, not yet sharded. Its attention is set to ours,
    or back to its default. Raises ConfigError if it cannot be evaluated at all.
    """
    default = causal_lm.config._attn_implementation
    row = _probe_row(causal_lm)
    with torch.no_grad():
        alone = Policy(causal_lm, Evaluation(form=RowForm.PADDED, split_head=False))._logits(
            row, RowLayout(row.lengths, row.device)
        )
        if not bool(torch.isfinite(alone).all()):
            raise ConfigError(
                "the policy's logits are not finite on a simple input; its weights are unusable"
            )
        form = RowForm.PACKED if _packs_exactly(causal_lm, row, alone) else RowForm.PADDED
        if form is RowForm.PADDED:
            causal_lm.set_attn_implementation(default)
        split = Policy(causal_lm, Evaluation(form=form, split_head=True))
        hidden = split._hidden(row, RowLayout(row.lengths, row.device))
        head = causal_lm.get_output_embeddings()
        plain = isinstance(head, nn.Linear) and head.bias is None
        split_head = plain and _close(head(hidden), alone)
    return Evaluation(form=form, split_head=split_head)


def _packs_exactly(causal_lm: Any, row: PackedRow, alone: torch.Tensor) -> bool:
    try:
        causal_lm.set_attn_implementation(PACKED)
        packed = Policy(causal_lm, Evaluation(form=RowForm.PACKED, split_head=False))
        if _close(packed._logits(row, RowLayout(row.lengths, row.device)), alone):
            return True
        reason = "packed sequences don't get the logits that they get alone"
    except (AttentionUnsupported, ValueError, TypeError) as error:
        reason = str(error)
    name = type(causal_lm).__name__
    _log.warning("%s is evaluated in padded batches, which is slower: %s", name, reason)
    return False


def _probe_row(causal_lm: Any) -> PackedRow:
    weight = causal_lm.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    token_ids_T = torch.randint(0, weight.shape[0], (sum(_PROBE_LENGTHS),), generator=generator)
    nothing = torch.zeros(0, dtype=torch.int64, device=weight.device)
    return PackedRow(
        members=(),
        lengths=_PROBE_LENGTHS,
        token_ids_T=token_ids_T.to(weight.device),
        positions_T=torch.cat([torch.arange(length) for length in _PROBE_LENGTHS]).to(weight.device),
        predictors_S=nothing,
        targets_S=nothing,
    )


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    scale = float(right.abs().max())
    return left.shape == right.shape and bool(((left - right).abs() <= _TOLERANCE * scale).all())
