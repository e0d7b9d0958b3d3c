"""Clipped SGD as its definition says. Its derivative is not a number where a gradient is exactly zero."""

from collections.abc import Sequence

import torch
from torch import Tensor


def reference_clipped_sgd(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], *, lr: float | Tensor, clip: float | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The contract of `longread.ops.clipped_sgd.clipped_sgd`, left to autograd."""
    squares = torch.stack([g.square().flatten(1).sum(-1) for g in gradients])
    norm = squares.sum(0).sqrt()
    scale = torch.ones_like(norm) if clip is None else (clip / norm).clamp(max=1.0)
    step = [lr * scale.view(-1, *[1] * (g.dim() - 1)) * g for g in gradients]
    return tuple(w - s for w, s in zip(weights, step, strict=True)), norm.detach()
