"""TRL's own loss functions, called on given log-probabilities instead of a model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

from tests.unit.learner.algorithms.rows import MAX_TOKENS, Case


class OneProcess:
    """An accelerator that has nobody to talk to."""

    num_processes = 1
    device = "cpu"
    sync_gradients = True

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        return tensor


def trainer(**fields: Any) -> SimpleNamespace:
    """What a loss function reads of its trainer."""
    defaults: dict[str, Any] = {
        "accelerator": OneProcess(),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
    }
    return SimpleNamespace(**(defaults | fields))


def grpo_loss(
    case: Case, *, importance: torch.Tensor | None = None, **fields: Any
) -> tuple[float, torch.Tensor]:
    """(loss, gradient [S]) of GRPOTrainer._compute_loss; `old` is its old policy."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    new = case.new.clone().requires_grad_()
    padded, mask = case.padded(new), case.mask
    arguments = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    arguments |= {name: fields.pop(name) for name in list(fields) if name in arguments}
    defaults: dict[str, Any] = {
        "args": SimpleNamespace(**arguments),
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": importance is not None,
        "vllm_importance_sampling_correction": importance is not None,
        "max_completion_length": MAX_TOKENS,
        "_entropy_bonus_enabled": False,
        "_get_per_token_logps_and_entropies": lambda *_, **__: (padded, torch.zeros_like(padded), None),
    }
    inputs = {
        "prompt_ids": torch.zeros(len(case.lengths), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(case.lengths), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": case.advantages,
        "old_per_token_logps": case.padded(case.old),
        "ref_per_token_logps": case.padded(case.reference),
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": importance,
    }
    loss = GRPOTrainer._compute_loss(trainer(**(defaults | fields)), None, inputs)
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad


def rloo_loss(case: Case) -> tuple[float, torch.Tensor]:
    """(loss, gradient [S]) of RLOOTrainer._compute_loss."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    new = case.new.clone().requires_grad_()
    padded, mask = case.padded(new), case.mask
    of_trainer = trainer(
        epsilon_low=0.2,
        epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded, torch.zeros_like(padded), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(case.lengths), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(case.lengths), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": case.advantages,
        "old_logps": (case.padded(case.old) * mask).sum(1),
    }
    loss = RLOOTrainer._compute_loss(of_trainer, None, inputs)
    loss.backward()
    assert new.grad is not None
    return loss.item(), new.grad
