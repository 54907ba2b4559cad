"""AdamW, its learning rate as a function of the step, and the check before each update."""

from __future__ import annotations

import math

import torch
from torch import nn

from learner.training.config import OptimizerConfig, Schedule
from learner.training.parallel import local, whole
from learner.training.pipeline import Stage
from learner.training.policy import Policy


def learning_rate(config: OptimizerConfig, *, step: int, num_steps: int) -> float:
    """Rate of the step that makes version step + 1: linear warm-up, then the schedule, over steps 0 .. num_steps - 1.

    Linear and cosine fall from the full rate, in the first step after the warm-up, to
    0, which they would reach with step `num_steps`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    if config.schedule is Schedule.LINEAR:
        return config.learning_rate * (1.0 - progress)
    if config.schedule is Schedule.COSINE:
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate


def make_optimizer(policy: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decays matrices; leaves vectors (norms, biases) alone."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def clip_gradients(policy: nn.Module, *, max_norm: float) -> torch.Tensor:
    """Scales gradients down to a global norm; returns the norm before that, which may not be finite."""
    if isinstance(policy, Policy) and policy.stage is not None:
        return _clip_with_other_stages(policy, policy.stage, max_norm)
    return whole(nn.utils.clip_grad_norm_(policy.parameters(), max_norm, foreach=True))


def _clip_with_other_stages(policy: Policy, stage: Stage, max_norm: float) -> torch.Tensor:
    gradients = {name: p.grad for name, p in policy.causal_lm.named_parameters() if p.grad is not None}
    if stage.tied is not None:
        stage.add_tied(local(gradients[stage.tied]))
    own = whole(
        nn.utils.get_total_norm([g for name, g in gradients.items() if stage.owns(name)], foreach=True)
    )
    norm = stage.total(own.square()).sqrt()
    torch._foreach_mul_([local(g) for g in gradients.values()], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def step_if(optimizer: torch.optim.Optimizer, is_finite: torch.Tensor, *, learning_rate: float) -> None:
    """Takes the step if the flag is set, and changes nothing otherwise.

    is_finite: a bool on the device. The host does not read it, so that a GPU has the step queued behind
    the backward pass instead of waiting until the host knows.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # Parameters that wait in host memory are updated there: only then the host has to read the flag.
    where = optimizer.param_groups[0]["params"][0].device
    # What torch's loss scaler sets: the fused kernel reads it and does nothing where it is 1.
    optimizer.found_inf = (~is_finite).float().to(where)  # type: ignore[attr-defined]
    optimizer.step()
