"""The common parts of chunked recurrences: cutting a sequence into chunks, and the decay between the tokens of one."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def cut(x: Tensor, size: int) -> Tensor:
    """[B, T, ...] as [B, chunks, size, ...]; zeros, which write nothing and do not decay, fill the last chunk."""
    missing = -x.shape[1] % size
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (-1, size))


def decays(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """From chunks [B, chunks, size, N] of log decays, in logarithms and as factors.

    Returns:
        g, their sum up to and with each token, [B, chunks, N, size], and exp(g_i − g_j) for j <= i, else 0,
        [B, chunks, N, size, size].
    """
    total = log_decay.transpose(2, 3).cumsum(-1)
    size = total.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -math.inf).exp()
    return total, between
