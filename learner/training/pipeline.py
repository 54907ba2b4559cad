"""Pipeline parallelism: each stage, a group of ranks, has some consecutive blocks of the policy.

    tokens --> [embedding, blocks] -- hidden states --> [blocks] -- ... --> [blocks, norm, logits] --> scores
                        <-- their gradients --                <-- ... --

The rows of an update follow each other through the stages. A stage is ahead by as many forward
passes as there are stages behind it; then each of its forward passes is followed by a
backward pass of the oldest row that it has ("1F1B", Narayanan et al. 2021, "Megatron-LM"), so that
no stage keeps more rows than there are stages. Within a stage FSDP2 shards as it does without.

T   tokens of a row, as this rank has them     H   hidden size
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from learner.algorithms.sums import Sums
from learner.training.packing import PackedRow
from learner.training.policy import Policy, RowForm, TokenScores
from learner.training.tensor_parallel import FAMILIES
from penstock.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineGroup:
    """The ranks that a row goes through, one a stage, and this one's place among them."""

    ranks: tuple[int, ...]
    """From the first stage to the last."""
    stage: int
    forth: dist.ProcessGroup
    back: dist.ProcessGroup
    """A group for each direction: NCCL keeps the order of all that two ranks of a group send each other."""
    ends: dist.ProcessGroup
    """The first and the last stage."""

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.ranks) - 1

    @property
    def num_behind(self) -> int:
        """Stages that a row goes through after this one."""
        return len(self.ranks) - 1 - self.stage


def open_pipeline(
    rank: int, world_size: int, num_stages: int, *, timeout_seconds: float
) -> PipelineGroup | None:
    """Neighbouring ranks are of one stage. A collective. None for a single stage."""
    if num_stages == 1:
        return None
    stage_size = world_size // num_stages
    mine: PipelineGroup | None = None
    for column in range(stage_size):
        ranks = tuple(range(column, world_size, stage_size))
        # Every rank takes part in making every group.
        forth, back, ends = (
            dist.new_group(members, timeout=timedelta(seconds=timeout_seconds))
            for members in (ranks, ranks, (ranks[0], ranks[-1]))
        )
        if rank in ranks:
            mine = PipelineGroup(ranks=ranks, stage=rank // stage_size, forth=forth, back=back, ends=ends)
    return mine


class _Elsewhere(nn.Module):
    """In the place of what another stage has: passes hidden states on."""

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """This rank's part of a policy."""

    group: PipelineGroup
    dtype: torch.dtype
    """Of hidden states."""
    hidden_size: int
    shapes: Mapping[str, torch.Size]
    """Of the whole policy's tensors, by name, in its order."""
    owners: Mapping[str, int]
    """The stage that has each; the first one, for tied embeddings, which the last has too."""
    tied: str | None
    """The embeddings, if they also give the logits and this is an end of the policy: both ends have them."""

    def owns(self, name: str) -> bool:
        return self.owners[name] == self.group.stage

    def collect(self, own: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the policy, in order, whole. On rank 0; elsewhere nothing is given out. A collective.

        own: this rank's, by name.
        """
        group = self.group
        in_line = group.ranks[0] == 0  # the ranks that rank 0 hears the other stages from
        for name, owner in self.owners.items():
            full = None
            if owner == group.stage:
                full = own[name]
                full = (full.full_tensor() if isinstance(full, DTensor) else full).contiguous()
            if in_line and owner > 0:
                if full is not None:
                    dist.send(full, 0, group.back)
                elif group.is_first:
                    like = next(iter(own.values()))
                    full = torch.empty(self.shapes[name], dtype=like.dtype, device=like.device)
                    dist.recv(full, group.ranks[owner], group.back)
            if full is not None and in_line and group.is_first:
                yield name, full

    def add_tied(self, gradient: torch.Tensor) -> None:
        """Gives both ends the gradient that tied embeddings have from looking up and from scoring."""
        dist.all_reduce(gradient, group=self.group.ends)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Adds what each stage has."""
        total = value.clone()
        dist.all_reduce(total, group=self.group.back)
        return total


class Passage:
    """Hands hidden states, and their gradients, over between neighbouring stages."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self._stage = stage
        self._group = stage.group
        self._device = device
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()
        """What may still be under way."""

    def receive(self, num_tokens: int) -> torch.Tensor | None:
        """[1, T, H] from the stage before; None on the first."""
        if self._group.is_first:
            return None
        hidden_1TH = self._empty(num_tokens)
        dist.recv(hidden_1TH, self._neighbour(-1), self._group.forth)
        return hidden_1TH

    def send(self, hidden_1TH: torch.Tensor) -> None:
        self._send(hidden_1TH, +1, self._group.forth)

    def receive_gradient(self, num_tokens: int) -> torch.Tensor:
        gradient_1TH = self._empty(num_tokens)
        dist.recv(gradient_1TH, self._neighbour(+1), self._group.back)
        return gradient_1TH

    def send_gradient(self, gradient_1TH: torch.Tensor) -> None:
        self._send(gradient_1TH, -1, self._group.back)

    def finish(self) -> None:
        """Returns once all that was sent has arrived."""
        self._wait(0)

    def _send(self, states_1TH: torch.Tensor, step: int, group: dist.ProcessGroup) -> None:
        states_1TH = states_1TH.detach().to(self._stage.dtype).contiguous()
        self._sent.append((dist.isend(states_1TH, self._neighbour(step), group), states_1TH))
        # In training a neighbour is never so far behind; in scoring alone this holds back who is ahead.
        self._wait(2 * len(self._group.ranks))

    def _wait(self, num_left: int) -> None:
        while len(self._sent) > num_left:
            work, _ = self._sent.popleft()
            work.wait()

    def _neighbour(self, step: int) -> int:
        return self._group.ranks[self._group.stage + step]

    def _empty(self, num_tokens: int) -> torch.Tensor:
        return torch.empty(
            1, num_tokens, self._stage.hidden_size, dtype=self._stage.dtype, device=self._device
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pending:
    """A row between its two passes on this stage."""

    received_1TH: torch.Tensor | None
    made: torch.Tensor
    """Hidden states, or on the last stage the loss."""


def train_rows(
    policy: Policy,
    rows: Sequence[PackedRow],
    *,
    temperature: float,
    loss_of: Callable[[PackedRow, TokenScores], tuple[torch.Tensor, Sums]],
    before_backward: Callable[[bool], None],
) -> list[Sums]:
    """Forward and backward passes of all rows. Returns each row's sums; on all stages but the last they are nothing.

    loss_of: what to differentiate, and the sums. before_backward: is told whether a row is the last.
    """
    assert policy.stage is not None
    group, passage = policy.stage.group, Passage(policy.stage, rows[0].device)
    pending: deque[_Pending] = deque()
    parts: list[Sums] = []

    def go_forward(row: PackedRow) -> None:
        received_1TH = passage.receive(policy.num_hidden(row))
        if received_1TH is not None:
            received_1TH.requires_grad_()
        made = policy(replace(row, hidden_1TH=received_1TH), temperature=temperature)
        if group.is_last:
            made, sums = loss_of(row, made)
        else:
            passage.send(made)
            sums = _nothing(loss_of, row)
        parts.append(sums)
        pending.append(_Pending(received_1TH=received_1TH, made=made))

    def go_back(is_last: bool) -> None:
        row = pending.popleft()
        before_backward(is_last)
        gradient = None if group.is_last else passage.receive_gradient(row.made.shape[1])
        torch.autograd.backward(row.made, gradient)
        if row.received_1TH is not None:
            assert row.received_1TH.grad is not None
            passage.send_gradient(row.received_1TH.grad)

    for row in rows:
        go_forward(row)
        if len(pending) > group.num_behind:
            go_back(is_last=len(parts) == len(rows) and len(pending) == 1)
    while pending:
        go_back(is_last=len(pending) == 1)
    passage.finish()
    return parts


def score_rows(
    policy: Policy, rows: Sequence[PackedRow], *, temperature: float
) -> Iterator[tuple[PackedRow, TokenScores]]:
    """Forward passes alone. Gives scores on the last stage, and nothing on the others."""
    assert policy.stage is not None
    group, passage = policy.stage.group, Passage(policy.stage, rows[0].device)
    for row in rows:
        begun = replace(row, hidden_1TH=passage.receive(policy.num_hidden(row)))
        made = policy(begun, temperature=temperature)
        if group.is_last:
            yield row, made
        else:
            passage.send(made)
    passage.finish()


def _nothing(loss_of: Callable[[PackedRow, TokenScores], tuple[torch.Tensor, Sums]], row: PackedRow) -> Sums:
    """What adds nothing to the sums that the last stage has, under their names."""
    zeros_S = torch.zeros(row.targets_S.shape, device=row.device)
    with torch.no_grad():
        _, sums = loss_of(row, TokenScores(logprobs_S=zeros_S, entropy_S=zeros_S))
    return {
        name: torch.full_like(value, -torch.inf if name.endswith("_max") else 0.0)
        for name, value in sums.items()
    }


def split(policy: Policy, group: PipelineGroup, dtype: torch.dtype) -> Stage:
    """Leaves of a policy what this rank's stage has; its names stay. Raises ConfigError.

    dtype: of hidden states.
    """
    causal_lm, num_stages = policy.causal_lm, len(group.ranks)
    _refuse_indivisible(policy, num_stages)
    base, last = causal_lm.base_model, num_stages - 1
    is_tied = causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight
    bounds = [len(base.layers) * stage // num_stages for stage in range(num_stages + 1)]
    stages = {base.embed_tokens: 0, base.norm: last, causal_lm.lm_head: last}
    for stage in range(num_stages):
        stages |= dict.fromkeys(base.layers[bounds[stage] : bounds[stage + 1]], stage)
    parts = {name: module for name, module in causal_lm.named_modules() if module in stages}
    owners, shapes = {}, {}
    for name, parameter in causal_lm.named_parameters():
        owners[name] = next(stages[module] for part, module in parts.items() if name.startswith(f"{part}."))
        shapes[name] = parameter.shape
    kept = {base.embed_tokens} if is_tied and group.is_last else set()
    for part, module in parts.items():
        if stages[module] != group.stage and module not in kept:
            causal_lm.set_submodule(part, _Elsewhere())
    return Stage(
        group=group,
        dtype=dtype,
        hidden_size=causal_lm.config.hidden_size,
        shapes=shapes,
        owners=owners,
        tied=next(iter(owners)) if is_tied and (group.is_first or group.is_last) else None,
    )


def _refuse_indivisible(policy: Policy, num_stages: int) -> None:
    """Raises ConfigError."""
    config, what = policy.causal_lm.config, f"training.pipeline_ranks is {num_stages}, but "
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{what}policies of type {config.model_type} are not divided; expected {', '.join(FAMILIES)}"
        )
    is_packed = policy.evaluation.form is RowForm.PACKED and policy.evaluation.split_head
    if type(policy) is not Policy or policy.adapters is not None or not is_packed:
        raise ConfigError(
            f"{what}a critic, a policy with adapters, and one that is not evaluated in packed rows, cannot be divided "
            "by blocks; set it to 1"
        )
    if num_stages > config.num_hidden_layers:
        raise ConfigError(
            f"{what}the policy has {config.num_hidden_layers} blocks; expected at most a rank a block"
        )
