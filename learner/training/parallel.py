"""The trainer's ranks: who they are, what they agree on, and how they share the policy.

One rank alone needs no process group. Several meet through a file (RENDEZVOUS_VARIABLE,
whose path `agent.py` sets) and talk over the loopback interface, so that nothing listens beyond
127.0.0.1.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch._C._distributed_c10d import FileStore, HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from learner.training import attention
from learner.training.config import Device, Precision
from learner.training.context import ContextGroup
from learner.training.cpu import use_fast_float32
from learner.training.deferred import fill
from learner.training.launch import RENDEZVOUS_VARIABLE
from learner.training.pipeline import PipelineGroup, open_pipeline, split
from learner.training.policy import Policy, RowForm
from learner.training.tensor_parallel import TensorGroup, divide
from penstock.errors import ConfigError
from penstock.memory import keep_activations

_log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT_SECONDS = 600.0
"""A collective that takes longer has lost a rank: the process ends with an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the trainer's ranks."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """What FSDP2 shards the policy over: (shard), or (replicate, shard). None for one rank that needs no
    process group."""
    context: ContextGroup | None = None
    """The ranks that hold the same rows as this one, a slice of the tokens each."""
    tensor: TensorGroup | None = None
    """The ranks that hold the same rows as this one, and a share of each matrix."""
    pipeline: PipelineGroup | None = None
    """The ranks that hold the same rows as this one, and other blocks."""
    offload: bool = False
    """Parameters, gradients and the optimiser's state wait in host memory, and the optimiser runs there."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def num_shares(self) -> int:
        """How many ranks, or groups of ranks, have rows of their own."""
        return self._stage_size // self._share_size

    @property
    def share(self) -> int:
        """Which of them this rank belongs to."""
        return self.rank % self._stage_size // self._share_size

    @property
    def of_stage(self) -> range:
        """The ranks that have the same blocks as this one, or shards of them."""
        first = self.rank // self._stage_size * self._stage_size
        return range(first, first + self._stage_size)

    @property
    def num_averaged(self) -> int:
        """How many ranks' gradients FSDP2 takes the mean of: all but those that share a matrix."""
        return self._stage_size // (self.tensor.size if self.tensor else 1)

    @property
    def keeps_weights(self) -> bool:
        """Whether FSDP2 has nobody to share with, nor host memory to put weights into: copies to compute with stay."""
        return self.mesh is not None and self.mesh.size() == 1 and not self.offload

    @property
    def _stage_size(self) -> int:
        return self.world_size // (len(self.pipeline.ranks) if self.pipeline else 1)

    @property
    def _share_size(self) -> int:
        return (self.context.size if self.context else 1) * (self.tensor.size if self.tensor else 1)

    def sum_of_shares(self, values: torch.Tensor) -> torch.Tensor:
        """Adds what each share measured on its rows; the ranks of a share measured the same, or on all stages but
        the last nothing."""
        return self.sum(values) / self._share_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a tensor over all ranks; every rank gets the total."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of each element over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """One CPU tensor of equal shape from every rank, in rank order."""
        if self.world_size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values)
        return parts

    def gather_bytes(self, data: bytes) -> list[NDArray[np.uint8]]:
        """Every rank's, of any length, in rank order."""
        sizes = [int(size) for size in self.gather(torch.tensor([len(data)]))]
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        return [part[:size].numpy() for part, size in zip(self.gather(padded), sizes, strict=True)]

    def barrier(self) -> None:
        """Waits until every rank is here; bounded by COLLECTIVE_TIMEOUT_SECONDS."""
        self.sum(torch.zeros(1))

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _reduce(self, values: torch.Tensor, operation: Any) -> torch.Tensor:
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values, operation)
        return values


def open_ranks(
    device: Device,
    precision: Precision,
    *,
    num_replicas: int = 1,
    context_ranks: int = 1,
    tensor_ranks: int = 1,
    pipeline_ranks: int = 1,
    cpu_offload: bool = False,
) -> Ranks:
    """Joins the other ranks as the environment says: RANK, WORLD_SIZE, LOCAL_RANK. Raises ConfigError.

    num_replicas: whole copies of the policy, each sharded over a part of the ranks.
    context_ranks: neighbouring ranks, or neighbouring groups of tensor_ranks, that hold one row together.
    tensor_ranks: neighbouring ranks that share each matrix.
    pipeline_ranks: stages, each of neighbouring ranks, that have consecutive blocks.
    cpu_offload: keeps what is not being computed with in host memory; on a CPU it is there anyway.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    where = _local_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if where.type == "cpu":
        use_fast_float32()
        keep_activations()
    mesh = context = tensor = pipeline = None
    if cpu_offload and where.type == "cpu":
        _log.warning(
            "training.cpu_offload makes no difference: there is no GPU, and all is on the CPU already"
        )
    offload = cpu_offload and where.type != "cpu"
    if world_size > 1 or precision is Precision.BFLOAT16 or offload:
        _join(rank, world_size, where)
        mesh, tensor = _parameter_meshes(where.type, world_size, num_replicas, tensor_ranks, pipeline_ranks)
        context = _context_group(where.type, world_size, context_ranks, tensor_ranks)
        pipeline = open_pipeline(rank, world_size, pipeline_ranks, timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS)
    return Ranks(
        rank=rank,
        world_size=world_size,
        device=where,
        mesh=mesh,
        context=context,
        tensor=tensor,
        pipeline=pipeline,
        offload=offload,
    )


def _parameter_meshes(
    device_type: str, world_size: int, num_replicas: int, tensor_ranks: int, pipeline_ranks: int
) -> tuple[DeviceMesh, TensorGroup | None]:
    """What parameters are sharded over, and what matrices are divided over first."""
    sizes = {
        "stage": pipeline_ranks,
        "replicate": num_replicas,
        "shard": world_size // (num_replicas * tensor_ranks * pipeline_ranks),
        "tensor": tensor_ranks,
    }
    names = tuple(name for name, size in sizes.items() if size > 1 or name == "shard")
    mesh = init_device_mesh(device_type, tuple(sizes[name] for name in names), mesh_dim_names=names)
    if pipeline_ranks > 1:
        names = names[1:]
        mesh = mesh[names]
    if tensor_ranks == 1:
        return mesh, None
    # It advises on what two divisions of one tensor cost, which is known.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    return mesh[names[:-1]], TensorGroup(mesh=mesh["tensor"])


def _context_group(
    device_type: str, world_size: int, context_ranks: int, tensor_ranks: int
) -> ContextGroup | None:
    if context_ranks == 1:
        return None
    shape = (world_size // (context_ranks * tensor_ranks), context_ranks, tensor_ranks)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("rows", "context", "tensor"))["context"]
    return ContextGroup(group=mesh.get_group(), rank=mesh.get_local_rank(), size=context_ranks)


def _local_device(device: Device, local_rank: int) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if device is Device.CUDA and not has_cuda:
        raise ConfigError("training.device is cuda, but torch finds no CUDA device; use auto or cpu")
    if device is Device.CPU or not has_cuda:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"training.num_ranks needs a GPU each, but this host has {torch.cuda.device_count()}; use fewer ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(rank: int, world_size: int, device: torch.device) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    path = os.environ.get(RENDEZVOUS_VARIABLE)
    if world_size > 1 and not path:
        raise ConfigError(
            f"{world_size} ranks, but {RENDEZVOUS_VARIABLE} is not set; start them with launch_command"
        )
    store = FileStore(path, world_size) if path and world_size > 1 else HashStore()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
    )


def place(policy: Policy, ranks: Ranks, precision: Precision, *, compiled: bool = False) -> None:
    """Moves the policy to its device and, where there is a mesh, shards it block by block (FSDP2), after
    ranks that share matrices have divided them. Raises ConfigError.

    Master weights and gradient reduction are float32; blocks compute in `precision`, in which what is
    frozen is also kept. With `compiled`, torch.compile makes kernels of each block and of what follows them,
    once for all row lengths. Weights that are not read yet are read at the end, by each rank its part.
    """
    compute = torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32
    _store_frozen(policy, compute)
    _give_groups(policy, ranks)
    if ranks.pipeline is not None:
        policy.stage = split(policy, ranks.pipeline, compute)
    blocks = _blocks(policy.causal_lm)
    attention.prepare(ranks.device)
    if compiled:
        for module in (*blocks, *_norms(policy.causal_lm)):
            module.forward = torch.compile(module.forward, dynamic=True)
    if ranks.mesh is None:
        _read(policy, ranks)
        policy.to(ranks.device)
        return
    mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if ranks.offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=ranks.mesh, mp_policy=mixed, offload_policy=offload)
    for block in blocks:
        shard(block, reshard_after_forward=not ranks.keeps_weights)
    shard(policy)
    _read(policy, ranks)


def _read(policy: Policy, ranks: Ranks) -> None:
    """Fills what is on the meta device."""
    if policy.source is not None:
        where = torch.device("cpu") if ranks.offload else ranks.device
        fill(policy, policy.source.folder, rank=ranks.rank, device=where, seed=policy.source.seed)
        policy.source = None


def _store_frozen(policy: Policy, compute: torch.dtype) -> None:
    """What isn't trained needs no master."""
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(compute)


def _give_groups(policy: Policy, ranks: Ranks) -> None:
    """Has ranks that hold a row together share its tokens, its heads and the matrices. Raises ConfigError."""
    policy.context, policy.tensor = ranks.context, ranks.tensor
    context_ranks = ranks.context.size if ranks.context else 1
    tensor_ranks = ranks.tensor.size if ranks.tensor else 1
    if context_ranks * tensor_ranks == 1:
        return
    evaluation = policy.evaluation
    is_packed = evaluation.form is RowForm.PACKED and (evaluation.split_head or ranks.tensor is None)
    heads = policy.causal_lm.config.num_attention_heads
    if not is_packed or heads % (context_ranks * tensor_ranks):
        raise ConfigError(
            f"training.context_ranks is {context_ranks} and tensor_ranks {tensor_ranks}: they need a policy that "
            f"is evaluated in packed rows and whose {heads} attention heads their product divides; set them lower"
        )
    if ranks.tensor is not None:
        divide(policy.causal_lm, ranks.tensor)


def reshard(policy: Policy) -> None:
    """Drops gathered weights that a forward pass without a backward pass left behind: they would outlive a
    change of the sharded ones."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def accumulate(policy: Policy, ranks: Ranks, is_last: bool) -> None:
    """Call before each row's backward pass. A rank that keeps its compute copies adds gradients up until the last."""
    if isinstance(policy, FSDPModule) and ranks.keeps_weights:
        policy.set_requires_gradient_sync(is_last)
        policy.set_reshard_after_backward(is_last)


def _blocks(causal_lm: Any) -> list[nn.Module]:
    """The repeated layers: what transformers declares unsplittable, else the longest list of modules."""
    names = set(causal_lm._no_split_modules or ())
    declared = [module for module in causal_lm.modules() if type(module).__name__ in names]
    if declared:
        return declared
    lists = [list(module) for module in causal_lm.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _norms(causal_lm: Any) -> list[nn.Module]:
    """What stands beside the blocks and holds vectors only."""
    return [
        child
        for child in causal_lm.base_model.children()
        if list(child.parameters()) and all(parameter.ndim < 2 for parameter in child.parameters())
    ]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, gradient or optimiser state; all of it when it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on every rank. A collective when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
