"""Linear layer and cross-entropy as their definition says."""

import torch
from torch import Tensor

from longread.ops.attention.reference import capped


def reference_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, soft_cap: float | None = None) -> Tensor:
    """The contract of `longread.ops.cross_entropy.cross_entropy`, left to autograd; keeps all logits."""
    logits = hidden @ head.to(hidden.dtype).t()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if soft_cap is not None:
        wide = capped(wide, soft_cap)
    return wide.logsumexp(-1) - wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
