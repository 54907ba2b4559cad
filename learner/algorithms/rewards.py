"""The loss of a reward model.

P   pairs of an update
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def bradley_terry(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, margins_P: torch.Tensor, *, centering: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(chosen - rejected - margin), plus centering (chosen + rejected)^2: [P].

    Bradley & Terry 1952; the margin as in Touvron et al. 2023 ("Llama 2", eq. 2); the
    centering keeps rewards near 0 (Eisenstein et al. 2023). chosen_P, rejected_P: rewards
    of the answers. margins_P: 0 where there is none.
    """
    losses_P = -logsigmoid(chosen_P - rejected_P - margins_P)
    return losses_P + centering * (chosen_P + rejected_P).square()
