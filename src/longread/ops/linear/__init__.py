"""Matrix products with a weight that is used many times before its gradient is due.

The scan over mini-batches multiplies with the same slow weights at every step, twice where the step is
differentiated. Left to autograd, each use casts the weight and adds its own gradient to a running sum. Here the weight
is cast once, every use leaves a pair of factors, and one long product makes the gradient (order 2).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import needed_inputs

Pairs = list[tuple[Tensor, Tensor]]


class SharedWeight:
    """A weight [out, in] in the type of the products; multiply with it as often as needed in one graph."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._pairs: Pairs = []
        self._cast: Tensor = _Share.apply(weight, dtype, self._pairs)

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ for x [..., in] of the type given above: [..., out]."""
        return _Product.apply(x, self._cast, self._pairs)


class _Share(torch.autograd.Function):
    """The cast of a weight. All uses run before this backward does, and none hands it a gradient but through pairs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, pairs: Pairs) -> Tensor:
        ctx.pairs, ctx.dtype = pairs, weight.dtype
        ctx.set_materialize_grads(False)
        return weight.to(dtype) if weight.dtype != dtype else weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, unused: Tensor | None) -> tuple[Tensor | None, None, None]:
        if not ctx.pairs:
            return unused, None, None
        x, dy = (torch.cat(factors) if len(factors) > 1 else factors[0] for factors in zip(*ctx.pairs, strict=True))
        ctx.pairs.clear()
        if ctx.dtype != x.dtype and x.is_cuda:
            return torch.mm(dy.t(), x, out_dtype=ctx.dtype), None, None
        return torch.mm(dy.t(), x).to(ctx.dtype), None, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pairs = pairs
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = needed_inputs(ctx)
        if needs_weight:
            if torch.is_grad_enabled():
                raise RuntimeError("the gradient of a shared weight is taken once, at the end; it cannot be recorded")
            ctx.pairs.append((_flat(x), _flat(dy)))
        return _Back.apply(dy, weight, ctx.pairs) if needs_x else None, None, None


class _Back(torch.autograd.Function):
    """dx = dy W, whose own derivative multiplies with W again."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(dy, weight)
        ctx.pairs = pairs
        return dy @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, None, None]:
        dy, weight = ctx.saved_tensors
        needs_dy, needs_weight = needed_inputs(ctx)
        if needs_weight:
            ctx.pairs.append((_flat(u), _flat(dy)))
        return torch.nn.functional.linear(u, weight) if needs_dy else None, None, None
