"""A gain that many norms of one graph share.

The scan over mini-batches norms by the same gains at every step, twice where the step is differentiated. Left to
autograd, each use sums a gradient over its rows and adds that to a running sum. Here every kernel adds to the partial
sums of the one before, and they are summed once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SharedGain(NamedTuple):
    """A gain, and what its uses leave for its gradient."""

    weight: Tensor
    """[D]"""
    sums: list[Tensor]
    """Empty, or one of float32 [programs, D], whose rows add up to a part of the gradient."""


def shared_gain(weight: Tensor) -> SharedGain:
    """A gain [D] to norm by as often as needed in one graph; its gradient cannot be recorded."""
    sums: list[Tensor] = []
    return SharedGain(_GainOfAll.apply(weight, sums), sums)


class _GainOfAll(torch.autograd.Function):
    """All uses run before this backward does. Kernels hand it gradients by `sums`, plain PyTorch as always."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sums: list[Tensor]) -> Tensor:
        ctx.sums, ctx.dtype = sums, weight.dtype
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        if ctx.sums:
            total = ctx.sums.pop().sum(0).to(ctx.dtype)
            gradient = total if gradient is None else gradient + total
        return gradient, None
