"""The per-sequence MLP with the derivatives of its products written out.

For y = x Wᵀ with W [B, O, I], dx = dy W and dW = dyᵀ x. Cotangents u of dx and V of dW give

    (dy)^ = u Wᵀ + x Vᵀ        x̂ = dy V        Ŵ = dyᵀ u

Left to autograd these are the same products, but gradients of weights come out transposed in memory, and every step
of SGD on them begins with a copy.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longread.ops.needed import needed_inputs
from longread.ops.swiglu import Activation, swiglu


def explicit_fast_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation = "silu") -> Tensor:
    """The contract of `longread.ops.fast_mlp.fast_mlp`."""
    gate, up, down = (w.to(x.dtype) for w in (gate, up, down))
    return _Product.apply(swiglu(_Product.apply(x, gate), _Product.apply(x, up), activation), down)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        dx, dweight = _ProductGradient.apply(*ctx.saved_tensors, dy, needed_inputs(ctx))
        return dx, dweight


class _ProductGradient(torch.autograd.Function):
    """(x, W, dy) -> (dx, dW)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dy: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(x, weight, dy)
        ctx.set_materialize_grads(False)
        return dy @ weight if needs[0] else None, dy.mT @ x if needs[1] else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, u: Tensor | None, V: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, dy = ctx.saved_tensors
        needs_x, needs_weight, needs_dy = needed_inputs(ctx)
        x_hat = dy @ V if V is not None and needs_x else None
        weight_hat = dy.mT @ u if u is not None and needs_weight else None
        dy_hat = None
        if needs_dy:
            dy_hat = u @ weight.mT if u is not None else None
            if V is not None:
                dy_hat = x @ V.mT if dy_hat is None else dy_hat.baddbmm_(x, V.mT)
        return x_hat, weight_hat, dy_hat, None
