"""The per-sequence MLP with the derivatives of its products written out.

For y = x Wᵀ with W [B, O, I], dx = dy W and dW = dyᵀ x. Cotangents u of dx and V of dW give

    (dy)^ = u Wᵀ + x Vᵀ        x̂ = dy V        Ŵ = dyᵀ u

Gate and up read the same x, so their parts of dx and x̂ are summed by the products. So is what the second derivative
leaves for x and W with what the first one brings (`longread.ops.needed`).

Left to autograd these are the same products, but every sum is a pass of its own, and gradients of weights come out
transposed in memory, so that every step of SGD on them begins with a copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import handed_on, needed_inputs
from longread.ops.swiglu import Activation, swiglu, swiglu_of_halves


def explicit_fast_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation = "silu") -> Tensor:
    """The contract of `longread.ops.fast_mlp.fast_mlp`."""
    gate, up, down = (w.to(x.dtype) for w in (gate, up, down))
    a, b, *_ = _Products.apply(x, gate, up)
    return _Products.apply(swiglu(a, b, activation), down)[0]


def explicit_fast_mlp_of_halves(x: Tensor, both: Tensor, down: Tensor, activation: Activation = "silu") -> Tensor:
    """The contract of `longread.ops.fast_mlp.fast_mlp_of_halves`."""
    both, down = both.to(x.dtype), down.to(x.dtype)
    return _Products.apply(swiglu_of_halves(_Products.apply(x, both)[0], activation), down)[0]


def _sum(total: Tensor | None, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """total, in its place where nothing is cast (autocast), plus the product of each pair; None counts nothing."""
    for left, right in pairs:
        if left is None or right is None:
            continue
        if total is None:
            total = left @ right
        elif total.dtype == left.dtype == right.dtype:
            total = total.baddbmm_(left, right)
        else:
            total = total + left @ right
    return total


class _Products(torch.autograd.Function):
    """(x, W, …) -> (x Wᵀ, …; x, W, … for `_ProductsGradient`)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        read = handed_on(ctx, x, *weights)
        ctx.save_for_backward(*read)
        ctx.set_materialize_grads(False)
        return *(x @ weight.mT for weight in weights), *read

    @staticmethod
    def backward(ctx: Any, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(adjoints) // 2
        some, left, needs = adjoints[:count], adjoints[count:], needed_inputs(ctx)
        if all(dy is None for dy in some):
            return left
        x, *weights = ctx.saved_tensors
        dys = [x.new_zeros(*x.shape[:2], w.shape[1]) if dy is None else dy for w, dy in zip(weights, some, strict=True)]
        if not torch.is_grad_enabled():  # then `left` is of `_ProductsGradient` alone, and may be written over
            return _gradient(x, *weights, *dys, needs=needs, left=left)
        found = _ProductsGradient.apply(x, *weights, *dys, needs)
        return tuple(_added(d, more) for d, more in zip(found, left, strict=True))


def _gradient(
    x: Tensor, *others: Tensor, needs: Sequence[bool], left: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """(x, W, …, dy, …) -> (dx, dW, …), where needed, onto what is left there."""
    count = len(others) // 2
    weights, dys = others[:count], others[count:]
    return (
        _sum(left[0], *zip(dys, weights, strict=True)) if needs[0] else None,
        *(_sum(more, (dy.mT, x)) if need else None for more, dy, need in zip(left[1:], dys, needs[1:], strict=True)),
    )


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _ProductsGradient(torch.autograd.Function):
    """(x, W, …, dy, …) -> (dx, dW, …)"""

    @staticmethod
    def forward(ctx: Any, *tensors_and_needs: Any) -> tuple[Tensor | None, ...]:
        *tensors, needs = tensors_and_needs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return _gradient(*tensors, needs=needs, left=[None] * len(needs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, *V: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(V)
        x, *others = ctx.saved_tensors
        weights, dys = others[:count], others[count:]
        needs = needed_inputs(ctx)
        return (
            _sum(None, *zip(dys, V, strict=True)) if needs[0] else None,
            *(_sum(None, (dy.mT, u)) if need else None for dy, need in zip(dys, needs[1 : 1 + count], strict=True)),
            *(
                _sum(None, (u, weight.mT), (x, None if v is None else v.mT)) if need else None
                for weight, v, need in zip(weights, V, needs[1 + count :], strict=True)
            ),
            None,
        )
